/* What a decode step on CPU does in bfloat16 beside its linear layers: RMSNorm, attention over the KV cache, SwiGLU.

   The definition is the model's own forward pass (model.py) with KVCache.attend (decode.py); tests/test_model.py holds this
   file to it. Attention here reads each key and value once, up to the row's own length, at near the speed of memory, where torch's
   batched products take several times as long. Plain loops: the compiler makes vectors of them. decode.py compiles this file for
   the machine and the model's D, G and BLOCK when it first decodes, and passes contiguous tensors.

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

/* silu(gate) * up for gate_up [n, 2 * size] -> out [n, size] */
void swiglu(int64_t n, int64_t size, const bf16 *gate_up, bf16 *out) {
#pragma omp parallel for
    for (int64_t r = 0; r < n; r++) {
        const bf16 *gate = gate_up + r * 2 * size, *up = gate + size;
        for (int64_t i = 0; i < size; i++) {
            float g = get(gate[i]), e = exp_(g < 0 ? g : -g);
            out[r * size + i] = put(g * (g < 0 ? e : 1) / (1 + e) * get(up[i]));
        }
    }
}

/* RoPE of one head; cosine and sine [D / 2] of its position */
static inline void rotate(const bf16 *x, const bf16 *cosine, const bf16 *sine, bf16 *out) {
    for (int i = 0; i < D / 2; i++) {
        float a = get(x[i]), b = get(x[i + D / 2]), c = get(cosine[i]), s = get(sine[i]);
        out[i] = put(a * c - b * s);
        out[i + D / 2] = put(b * c + a * s);
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
            rotate(heads + (G * K + k) * D, c, s, keys + new);
            memcpy(values + new, heads + (G * K + K + k) * D, D * sizeof(bf16));

            float q[G][D], score[G][BLOCK], y[G][D], top[G], sum[G];
            for (int g = 0; g < G; g++) {
                bf16 rotated[D];
                rotate(heads + (G * k + g) * D, c, s, rotated);
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
