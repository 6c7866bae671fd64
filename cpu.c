/* What the model does on CPU in bfloat16 between its matrix products: RMSNorm, SwiGLU, RoPE, softmax, attention of a decode step
   over the KV cache, log-probs of tokens; for training, with what their gradients need.

   The definition is model.py with KVCache.attend (decode.py); tests/test_cpu.py holds this file to it. Each kernel reads its
   numbers once or from the processor's cache, where torch's operations go through memory several times. Plain loops: the compiler
   makes vectors of them. cpu.py compiles this file for the machine and the model's D, G and BLOCK, and passes contiguous tensors.

   Shapes: n rows, H query heads, K key heads, G = H / K, D = head size, BLOCK = positions of a block of the cache. */
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;  /* the upper half of a float; computing is in float, rounded to nearest even where it is stored */

static inline float get(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

static inline bf16 put(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

/* e^x for x <= 0, 2e-7 of it at most off: 2^n e^t, and e^t by its series. expf() would be a call for each number. */
static inline float exp_(float x) {
    x = x < -87 ? -87 : x;
    float n = rintf(x * 1.44269504f), t = x - n * 0.693359375f + n * 2.12194440e-4f;  /* ln 2 in two parts: n times it is exact */
    float y = 1 + t * (1 + t * (1 / 2.f + t * (1 / 6.f + t * (1 / 24.f + t * (1 / 120.f + t / 720)))));
    uint32_t bits = (uint32_t)((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return y * power;
}

static inline float max_(const bf16 *x, int64_t n) {
    float top = -INFINITY;
#pragma omp simd reduction(max:top)  /* else no vectors: the order matters for NaN, which here reaches the sum in any case */
    for (int64_t i = 0; i < n; i++) top = get(x[i]) > top ? get(x[i]) : top;
    return top;
}

/* x [n, size] / root mean square * weight [size] -> out [n, size] */
void rms_norm(int64_t n, int64_t size, float eps, const bf16 *x, const bf16 *weight, bf16 *out) {
#pragma omp parallel for
    for (int64_t r = 0; r < n; r++) {
        const bf16 *in = x + r * size;
        float sum = 0;
        for (int64_t i = 0; i < size; i++) sum += get(in[i]) * get(in[i]);
        float scale = 1 / sqrtf(sum / size + eps);
        for (int64_t i = 0; i < size; i++) out[r * size + i] = put(get(in[i]) * scale * get(weight[i]));
    }
}

/* the gradients of rms_norm: grad [n, size] of out -> grad_x [n, size], grad_weight [size]; scale [n] is room for a number a row */
void rms_norm_backward(int64_t n, int64_t size, float eps, const bf16 *x, const bf16 *weight, const bf16 *grad, bf16 *grad_x, bf16 *grad_weight, float *scale) {
#pragma omp parallel for
    for (int64_t r = 0; r < n; r++) {
        const bf16 *in = x + r * size, *g = grad + r * size;
        float sum = 0, dot = 0;
        for (int64_t i = 0; i < size; i++) {
            sum += get(in[i]) * get(in[i]);
            dot += get(in[i]) * get(weight[i]) * get(g[i]);
        }
        float s = 1 / sqrtf(sum / size + eps), along = dot / size * s * s;
        for (int64_t i = 0; i < size; i++) grad_x[r * size + i] = put(s * (get(g[i]) * get(weight[i]) - get(in[i]) * along));
        scale[r] = s;
    }
#pragma omp parallel for
    for (int64_t start = 0; start < size; start += 64) {  /* by columns: each sum in the same order for any number of threads */
        int width = size - start < 64 ? size - start : 64;
        float sum[64] = {0};
        for (int64_t r = 0; r < n; r++)
            for (int i = 0; i < width; i++) sum[i] += get(grad[r * size + start + i]) * get(x[r * size + start + i]) * scale[r];
        for (int i = 0; i < width; i++) grad_weight[start + i] = put(sum[i]);
    }
}

static inline float sigmoid(float x) {
    float e = exp_(x < 0 ? x : -x);
    return (x < 0 ? e : 1) / (1 + e);
}

/* silu(gate) * up for gate_up [n, 2 * size], a row's gate and then its up -> out [n, size] */
void swiglu(int64_t n, int64_t size, const bf16 *gate_up, bf16 *out) {
#pragma omp parallel for
    for (int64_t r = 0; r < n; r++) {
        const bf16 *gate = gate_up + r * 2 * size, *up = gate + size;
        for (int64_t i = 0; i < size; i++) {
            float g = get(gate[i]);
            out[r * size + i] = put(g * sigmoid(g) * get(up[i]));
        }
    }
}

/* grad [n, size] of out -> grad_gate_up [n, 2 * size] */
void swiglu_backward(int64_t n, int64_t size, const bf16 *gate_up, const bf16 *grad, bf16 *grad_gate_up) {
#pragma omp parallel for
    for (int64_t r = 0; r < n; r++) {
        const bf16 *gate = gate_up + r * 2 * size, *up = gate + size;
        bf16 *grad_gate = grad_gate_up + r * 2 * size, *grad_up = grad_gate + size;
        for (int64_t i = 0; i < size; i++) {
            float g = get(gate[i]), s = sigmoid(g), d = get(grad[r * size + i]);
            grad_gate[i] = put(d * get(up[i]) * s * (1 + g * (1 - s)));
            grad_up[i] = put(d * g * s);
        }
    }
}

/* RoPE of one head; cosine and sine [D / 2] of its position, turn 1, or -1 for the way back */
static inline void rotate(const bf16 *x, const bf16 *cosine, const bf16 *sine, float turn, bf16 *out) {
    for (int i = 0; i < D / 2; i++) {
        float a = get(x[i]), b = get(x[i + D / 2]), c = get(cosine[i]), s = turn * get(sine[i]);
        out[i] = put(a * c - b * s);
        out[i + D / 2] = put(b * c + a * s);
    }
}

/* qkv [n, H + 2 K, D] -> queries [K, n, G, D], keys and values [K, size, D], with RoPE by cosine and sine [n, D / 2] of each row;
   the query heads of one key head lie side by side, and zeros follow the n keys and values */
void split_heads(int64_t n, int64_t K, int64_t size, const bf16 *qkv, const bf16 *cosine, const bf16 *sine, bf16 *q, bf16 *k, bf16 *v) {
#pragma omp parallel for
    for (int64_t r = 0; r < size; r++)
        for (int64_t h = 0; h < K; h++) {
            const bf16 *row = qkv + r * (G + 2) * K * D, *c = cosine + r * D / 2, *s = sine + r * D / 2;
            int64_t at = (h * size + r) * D;
            if (r < n) {
                for (int g = 0; g < G; g++) rotate(row + (h * G + g) * D, c, s, 1, q + ((h * n + r) * G + g) * D);
                rotate(row + (G * K + h) * D, c, s, 1, k + at);
                memcpy(v + at, row + (G * K + K + h) * D, D * sizeof(bf16));
            } else {
                memset(k + at, 0, D * sizeof(bf16));
                memset(v + at, 0, D * sizeof(bf16));
            }
        }
}

/* the way back, of their gradients */
void join_heads(int64_t n, int64_t K, int64_t size, const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *cosine, const bf16 *sine, bf16 *qkv) {
#pragma omp parallel for
    for (int64_t r = 0; r < n; r++)
        for (int64_t h = 0; h < K; h++) {
            const bf16 *c = cosine + r * D / 2, *s = sine + r * D / 2;
            bf16 *row = qkv + r * (G + 2) * K * D;
            for (int g = 0; g < G; g++) rotate(q + ((h * n + r) * G + g) * D, c, s, -1, row + (h * G + g) * D);
            rotate(k + (h * size + r) * D, c, s, -1, row + (G * K + h) * D);
            memcpy(row + (G * K + K + h) * D, v + (h * size + r) * D, D * sizeof(bf16));
        }
}

/* scores [K, n * G, size] of n queries, the first at position `first`, size a multiple of 16 -> probabilities, in place; causal, so
   zeros after a query's own position */
void softmax(int64_t K, int64_t n, int64_t size, int64_t first, bf16 *scores) {
    float factor = 1 / sqrtf(D);
#pragma omp parallel for
    for (int64_t r = 0; r < K * n * G; r++) {
        bf16 *row = scores + r * size;
        int64_t end = first + r / G % n + 1, whole = (end + 15) / 16 * 16;  /* whole vectors: what is left over would take longest */
        for (int64_t j = end; j < whole; j++) row[j] = put(-INFINITY);
        float top = max_(row, whole), sum = 0, e[size];
        for (int64_t j = 0; j < whole; j++) sum += e[j] = exp_((get(row[j]) - top) * factor);
        float inverse = 1 / sum;
        for (int64_t j = 0; j < whole; j++) row[j] = put(e[j] * inverse);
        memset(row + end, 0, (size - end) * sizeof(bf16));
    }
}

/* grad of these probabilities p -> of the products of queries and keys, in place */
void softmax_backward(int64_t K, int64_t n, int64_t size, int64_t first, const bf16 *p, bf16 *grad) {
    float factor = 1 / sqrtf(D);
#pragma omp parallel for
    for (int64_t r = 0; r < K * n * G; r++) {
        const bf16 *in = p + r * size;
        bf16 *out = grad + r * size;
        int64_t end = first + r / G % n + 1, whole = (end + 15) / 16 * 16;
        float dot = 0;
        for (int64_t j = 0; j < whole; j++) dot += get(in[j]) * get(out[j]);
        for (int64_t j = 0; j < whole; j++) out[j] = put(get(in[j]) * (get(out[j]) - dot) * factor);
        memset(out + end, 0, (size - end) * sizeof(bf16));
    }
}

/* logits [n, V] * factor -> the log of the sum of their exponentials and the target's log-probability [n]; entropy [n], unless NULL */
void token_logprob(int64_t n, int64_t V, float factor, const bf16 *logits, const int64_t *targets, float *total, float *logprob, float *entropy) {
#pragma omp parallel for
    for (int64_t r = 0; r < n; r++) {
        const bf16 *row = logits + r * V;
        float top = max_(row, V), sum = 0, mean = 0;
        if (entropy) {
            for (int64_t i = 0; i < V; i++) {
                float x = (get(row[i]) - top) * factor, e = exp_(x);
                sum += e;
                mean += e * x;
            }
            entropy[r] = logf(sum) - mean / sum;
        } else
            for (int64_t i = 0; i < V; i++) sum += exp_((get(row[i]) - top) * factor);
        total[r] = logf(sum) + top * factor;
        logprob[r] = get(row[targets[r]]) * factor - total[r];
    }
}

/* grad [n] of the log-probabilities -> of the logits, in their place */
void token_logprob_backward(int64_t n, int64_t V, float factor, bf16 *logits, const int64_t *targets, const float *total, const float *grad) {
#pragma omp parallel for
    for (int64_t r = 0; r < n; r++) {
        bf16 *row = logits + r * V;
        float g = grad[r] * factor, at_target = get(row[targets[r]]) * factor - total[r];
        for (int64_t i = 0; i < V; i++) row[i] = put(-g * exp_(get(row[i]) * factor - total[r]));
        row[targets[r]] = put(g * (1 - exp_(at_target)));
    }
}

/* logits [n, V] * factor -> a token a row, the first whose cumulative probability passes u [n], and its log-probability. Looked for
   among sums over 256 tokens, then inside; where rounding lets none pass, it is the last one with a probability there. */
void sample(int64_t n, int64_t V, float factor, const bf16 *logits, const float *u, int64_t *token, float *logprob) {
#pragma omp parallel for
    for (int64_t r = 0; r < n; r++) {
        const bf16 *row = logits + r * V;
        float top = max_(row, V), total = 0, before = 0, sums[V / 256 + 1];
        for (int64_t start = 0; start < V; start += 256) {
            int64_t end = start + 256 < V ? start + 256 : V;
            float sum = 0;
            for (int64_t i = start; i < end; i++) {
                float x = (get(row[i]) - top) * factor;
                sum += x <= -87 ? 0 : exp_(x);  /* such a token must not be taken, not even by a u of 0 */
            }
            total += sums[start / 256] = sum;
        }
        float target = u[r] * total;
        int64_t found = 0;
        for (int64_t start = 0; start < V; start += 256) {
            float sum = sums[start / 256];
            if (sum > 0) found = start;
            if (before + sum > target) break;
            before += sum;
        }
        for (int64_t i = found, end = found + 256 < V ? found + 256 : V; i < end; i++) {
            float x = (get(row[i]) - top) * factor;
            if (x <= -87) continue;
            found = i;
            before += exp_(x);
            if (before > target) break;
        }
        token[r] = found;
        logprob[r] = (get(row[found]) - top) * factor - logf(total);
    }
}

/* qkv [n, H + 2 K, D] of one new token a row, at positions [n], cosine and sine [n, D / 2]: rotates queries and keys, puts keys
   and values into one layer of the cache, whose blocks [rows, K, BLOCK, D] lie `stride` numbers apart, and attends -> out [n, H, D].
   The softmax goes over block after block with a running maximum: a block's scores stay in the first cache. */
void attend(int64_t n, int64_t K, const bf16 *qkv, const bf16 *cosine, const bf16 *sine, const int64_t *positions,
            bf16 *keys, bf16 *values, int64_t stride, bf16 *out) {
#pragma omp parallel for collapse(2)
    for (int64_t r = 0; r < n; r++)
        for (int64_t k = 0; k < K; k++) {
            const bf16 *heads = qkv + r * (G + 2) * K * D, *c = cosine + r * D / 2, *s = sine + r * D / 2;
            int64_t position = positions[r], at = (r * K + k) * BLOCK * D, new = at + position / BLOCK * stride + position % BLOCK * D;
            rotate(heads + (G * K + k) * D, c, s, 1, keys + new);
            memcpy(values + new, heads + (G * K + K + k) * D, D * sizeof(bf16));

            float q[G][D], score[G][BLOCK], y[G][D], top[G], sum[G];
            for (int g = 0; g < G; g++) {
                bf16 rotated[D];
                rotate(heads + (G * k + g) * D, c, s, 1, rotated);
                for (int i = 0; i < D; i++) q[g][i] = get(rotated[i]) / sqrtf(D), y[g][i] = 0;
                top[g] = -1e30f, sum[g] = 0;
            }
            for (int64_t start = 0; start <= position; start += BLOCK, at += stride) {
                int size = position + 1 - start < BLOCK ? position + 1 - start : BLOCK;
                for (int j = 0; j < size; j++) {
                    const bf16 *key = keys + at + j * D;
                    for (int i = 0; i < D; i += 32) __builtin_prefetch(key + 32 * D + i);  /* 32 positions ahead hide memory's delay */
                    for (int g = 0; g < G; g++) {
                        float dot = 0;
                        for (int i = 0; i < D; i++) dot += q[g][i] * get(key[i]);
                        score[g][j] = dot;
                    }
                }
                for (int g = 0; g < G; g++) {
                    float before = top[g], part = 0;
                    for (int j = 0; j < size; j++) top[g] = score[g][j] > top[g] ? score[g][j] : top[g];
                    for (int j = 0; j < size; j++) part += score[g][j] = exp_(score[g][j] - top[g]);
                    float keep = exp_(before - top[g]);
                    sum[g] = sum[g] * keep + part;
                    for (int i = 0; i < D; i++) y[g][i] *= keep;
                }
                for (int j = 0; j < size; j++) {
                    const bf16 *value = values + at + j * D;
                    for (int i = 0; i < D; i += 32) __builtin_prefetch(value + 32 * D + i);
                    for (int g = 0; g < G; g++)
                        for (int i = 0; i < D; i++) y[g][i] += score[g][j] * get(value[i]);
                }
            }
            for (int g = 0; g < G; g++)
                for (int i = 0; i < D; i++) out[((r * K + k) * G + g) * D + i] = put(y[g][i] / sum[g]);
        }
}
