/* Everything that the model computes on CPU in bfloat16 except its matrix products: RMSNorm, SwiGLU, RoPE, attention in training and in
   a decode step over the KV cache, log-probs of tokens; for training also the gradients.

   The definition is model.py with KVCache.attention (decode.py); tests/test_cpu.py compares this file with it. Each kernel reads its
   numbers once, or from the processor's cache, whereas torch's operations go through memory several times. The loops are plain, and the
   compiler vectorises them; only the products inside attention (`block`) name the processor's instructions. cpu.py compiles this file
   for the machine and the model's D, G and BLOCK, and passes contiguous tensors.

   Shapes: n rows, H query heads, K key heads, G = H / K, D = head size, BLOCK = positions of a block of the cache. */
#ifdef __AVX512F__
#pragma GCC target("prefer-vector-width=512")  /* by default gcc takes half of that */
#endif
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>
#if defined __AVX512BF16__ || defined __AMX_BF16__
#include <immintrin.h>
#endif
#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif

typedef uint16_t bf16;  /* the upper half of a float; numbers are computed in float and rounded to nearest even when they are stored */

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

/* e^x for x <= 0, with a relative error of at most 2e-7: 2^n e^t, and e^t by its series. expf() would be a call per number. */
static inline float exp_(float x) {
    x = x < -87 ? -87 : x;
    float n = rintf(x * 1.44269504f), t = x - n * 0.693359375f + n * 2.12194440e-4f;  /* ln 2 in two parts, so that n times the first is exact */
    float y = 1 + t * (1 + t * (1 / 2.f + t * (1 / 6.f + t * (1 / 24.f + t * (1 / 120.f + t * (1 / 720.f))))));
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

/* the gradients of rms_norm: grad [n, size] of out -> grad_x [n, size], to which `more`, what else x gets, is added, and grad_weight [size];
   sums [n / 64, rounded up, size] is room: added up in the same order for any number of threads */
void rms_norm_backward(int64_t n, int64_t size, float eps, const bf16 *x, const bf16 *weight, const bf16 *grad, const bf16 *more, bf16 *grad_x,
                       bf16 *grad_weight, float *sums) {
#pragma omp parallel for
    for (int64_t first = 0; first < n; first += 64) {
        float *total = sums + first / 64 * size;
        memset(total, 0, size * sizeof(float));
        for (int64_t r = first; r < n && r < first + 64; r++) {
            const bf16 *in = x + r * size, *g = grad + r * size, *rest = more + r * size;
            float sum = 0, dot = 0;
            for (int64_t i = 0; i < size; i++) {
                sum += get(in[i]) * get(in[i]);
                dot += get(in[i]) * get(weight[i]) * get(g[i]);
            }
            float s = 1 / sqrtf(sum / size + eps), along = dot / size * s * s;
            for (int64_t i = 0; i < size; i++) {
                grad_x[r * size + i] = put(s * (get(g[i]) * get(weight[i]) - get(in[i]) * along) + get(rest[i]));
                total[i] += get(g[i]) * get(in[i]) * s;
            }
        }
    }
    for (int64_t i = 0; i < size; i++) {
        float sum = 0;
        for (int64_t k = 0; k < (n + 63) / 64; k++) sum += sums[k * size + i];
        grad_weight[i] = put(sum);
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

/* ---- gradients of weights */

enum { T = 32 };  /* sides of the blocks that are turned, and of attention's below */

/* x [rows, cols], rows `stride` apart -> out [cols, rows] for up to T of both. A perfect shuffle moves the highest bit of an index to
   its lowest place; after five the column's bits are where the row's were. */
static inline void turn_block(int64_t rows, int64_t cols, const bf16 *x, int64_t stride, bf16 *out, int64_t out_stride) {
    bf16 blocks[2][T * T] = {{0}}, *from = blocks[0], *to = blocks[1];
    for (int64_t r = 0; r < rows; r++) memcpy(from + r * T, x + r * stride, cols * sizeof(bf16));
    for (int step = 0; step < 5; step++) {
        for (int i = 0; i < T * T / 2; i++) to[2 * i] = from[i], to[2 * i + 1] = from[T * T / 2 + i];
        bf16 *other = from;
        from = to, to = other;
    }
    for (int64_t c = 0; c < cols; c++) memcpy(out + c * out_stride, from + c * T, rows * sizeof(bf16));
}

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* x [rows, cols] -> out [cols, rows] */
void turn(int64_t rows, int64_t cols, const bf16 *x, bf16 *out) {
#pragma omp parallel for
    for (int64_t c = 0; c < cols; c += T)
        for (int64_t r = 0; r < rows; r += T) turn_block(least(T, rows - r), least(T, cols - c), x + r * cols + c, cols, out + c * rows + r, rows);
}

/* sum [n] += x [n] */
void add(int64_t n, const bf16 *x, float *sum) {
#pragma omp parallel for
    for (int64_t i = 0; i < n; i++) sum[i] += get(x[i]);
}

/* sum [width, rows] += columns of x [rows, cols], `width` from `first` on, turned */
void add_turned(int64_t rows, int64_t cols, int64_t first, int64_t width, const bf16 *x, float *sum) {
#pragma omp parallel for
    for (int64_t c = 0; c < width; c += T)
        for (int64_t r = 0; r < rows; r += T) {
            int64_t high = least(T, width - c), wide = least(T, rows - r);
            bf16 block[T * T];
            turn_block(wide, high, x + r * cols + first + c, cols, block, T);
            for (int64_t i = 0; i < high; i++)
                for (int64_t j = 0; j < wide; j++) sum[(c + i) * rows + r + j] += get(block[i * T + j]);
        }
}

/* ---- attention of scoring and training */

enum { W = (D + T - 1) / T * T };  /* sizes of products are multiples of T: W is the head size as one, with zeros at its end */

static int tiles;  /* whether products take the processor's matrix unit */

#ifdef __AMX_BF16__
int use_tiles(int wanted) {
    return tiles = wanted && !syscall(SYS_arch_prctl, 0x1023, 18);  /* Linux saves its registers only for a process that asks */
}

static void start_tiles(void) {  /* in each thread: eight tiles of 16 rows of 64 bytes */
    struct { uint8_t palette, zeros[15]; uint16_t bytes[16]; uint8_t rows[16]; } shape = {1};
    for (int i = 0; i < 8; i++) shape.bytes[i] = 64, shape.rows[i] = 16;
    if (tiles) _tile_loadconfig(&shape);
}

static void end_tiles(void) {
    if (tiles) _tile_release();
}
#else
int use_tiles(int wanted) { return 0; }
static void start_tiles(void) {}
static void end_tiles(void) {}
#endif

/* out [T, T], rows of `cols` numbers, = a [T, depth] b [depth, T], added to what is there if `add`; a's rows have lda numbers, b's ldb. b is in
   pairs: two of its rows lie number by number side by side, [depth / 2, ldb, 2], as processors want them that multiply bfloat16. */
static inline void block(int64_t depth, const bf16 *a, int64_t lda, const bf16 *b, int64_t ldb, float *out, int64_t cols, int add) {
#ifdef __AMX_BF16__
    if (tiles) {
        float *low = out + 16 * cols;
        if (add) {
            _tile_loadd(0, out, 4 * cols); _tile_loadd(1, out + 16, 4 * cols);
            _tile_loadd(2, low, 4 * cols); _tile_loadd(3, low + 16, 4 * cols);
        } else {
            _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
        }
        for (int64_t k = 0; k < depth; k += 32) {
            _tile_loadd(4, a + k, 2 * lda); _tile_loadd(5, a + k + 16 * lda, 2 * lda);
            _tile_loadd(6, b + k * ldb, 4 * ldb); _tile_loadd(7, b + k * ldb + 32, 4 * ldb);
            _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, out, 4 * cols); _tile_stored(1, out + 16, 4 * cols);
        _tile_stored(2, low, 4 * cols); _tile_stored(3, low + 16, 4 * cols);
        return;
    }
#endif
#ifdef __AVX512BF16__
    for (int r = 0; r < T; r += 8) {
        __m512 sum[8][2];
        for (int s = 0; s < 8; s++) sum[s][0] = sum[s][1] = _mm512_setzero_ps();
        for (int64_t k = 0; k < depth; k += 2) {
            __m512bh left = (__m512bh)_mm512_loadu_si512(b + k * ldb), right = (__m512bh)_mm512_loadu_si512(b + k * ldb + 32);
            for (int s = 0; s < 8; s++) {
                int pair;
                memcpy(&pair, a + (r + s) * lda + k, 4);
                __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
                sum[s][0] = _mm512_dpbf16_ps(sum[s][0], x, left);
                sum[s][1] = _mm512_dpbf16_ps(sum[s][1], x, right);
            }
        }
        for (int s = 0; s < 8; s++)
            for (int x = 0; x < 2; x++) {
                float *to = out + (r + s) * cols + 16 * x;
                _mm512_storeu_ps(to, add ? _mm512_add_ps(_mm512_loadu_ps(to), sum[s][x]) : sum[s][x]);
            }
    }
#else
    for (int r = 0; r < T; r += 4) {
        float sum[4][T] = {{0}};
        for (int64_t k = 0; k < depth; k += 2)
            for (int s = 0; s < 4; s++) {
                float even = get(a[(r + s) * lda + k]), odd = get(a[(r + s) * lda + k + 1]);
                for (int x = 0; x < T; x++) sum[s][x] += even * get(b[k * ldb + 2 * x]) + odd * get(b[k * ldb + 2 * x + 1]);
            }
        for (int s = 0; s < 4; s++)
            for (int x = 0; x < T; x++) out[(r + s) * cols + x] = sum[s][x] + (add ? out[(r + s) * cols + x] : 0);
    }
#endif
}

/* c [rows, cols] by such blocks; sizes are multiples of T */
static inline void product(int64_t rows, int64_t cols, int64_t depth, const bf16 *a, int64_t lda, const bf16 *b, int64_t ldb, float *c, int add) {
    for (int64_t i = 0; i < rows; i += T)
        for (int64_t j = 0; j < cols; j += T) block(depth, a + i * lda, lda, b + 2 * j, ldb, c + i * cols + j, cols, add);
}

/* x [rows, size] -> its pairs */
static inline void pairs(int64_t rows, int64_t size, const bf16 *x, bf16 *out) {
    for (int64_t r = 0; r < rows; r += 2)
        for (int64_t i = 0; i < size; i++) {
            out[r * size + 2 * i] = x[r * size + i];
            out[r * size + 2 * i + 1] = x[(r + 1) * size + i];
        }
}

/* x [rows, W] -> the pairs of x turned, [W / 2, rows, 2] */
static inline void turned_pairs(int64_t rows, const bf16 *x, bf16 *out) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < W; i += 2) memcpy(out + i * rows + 2 * r, x + r * W + i, 4);
}

/* rows of one head, `stride` apart, with RoPE if cosine and sine [n, D / 2] are given -> [whole, W], zeros around them */
static inline void gather(int64_t n, int64_t whole, const bf16 *x, int64_t stride, const bf16 *cosine, const bf16 *sine, bf16 *out) {
    for (int64_t r = 0; r < n; r++) {
        if (cosine) rotate(x + r * stride, cosine + r * (D / 2), sine + r * (D / 2), 1, out + r * W);
        else memcpy(out + r * W, x + r * stride, D * sizeof(bf16));
        memset(out + r * W + D, 0, (W - D) * sizeof(bf16));
    }
    memset(out + n * W, 0, (whole - n) * W * sizeof(bf16));
}

static inline int64_t up(int64_t n) { return (n + T - 1) / T * T; }

/* numbers that a thread needs for sequences of up to n tokens */
int64_t attention_room(int64_t n) { return up(n) * (4 * T + 4 * W) + 4 * T * W; }

/* The i-th unit of work: a key head h of a sequence of n tokens from `start` on, m of them with what makes whole blocks; x, c and s are its
   first rows of qkv, cosine and sine, room is this thread's. */
typedef struct { int64_t start, h, n, m; const bf16 *x, *c, *s; float *room; } Unit;

static inline Unit unit_of(int64_t i, int64_t K, const int64_t *lengths, const bf16 *qkv, const bf16 *cosine, const bf16 *sine, float *rooms, int64_t size) {
    int64_t start = 0, n = lengths[i / K];
    for (int64_t j = 0; j < i / K; j++) start += lengths[j];
    return (Unit){start, i % K, n, up(n), qkv + start * (G + 2) * K * D, cosine + start * (D / 2), sine + start * (D / 2),
                  rooms + omp_get_thread_num() * size};
}

static inline float *take(float **room, int64_t n) { return (*room += n) - n; }
static inline bf16 *take_half(float **room, int64_t n) { return (bf16 *)take(room, n / 2); }

/* RoPE and causal attention inside each of `count` sequences that lie end to end, the first of lengths[0] tokens: qkv [N, H + 2 K, D],
   cosine and sine [N, D / 2] -> out [N, H, D] and each softmax's log of the sum, total [N, H]. T queries of a head at a time. */
void attention(int64_t count, int64_t K, const int64_t *lengths, const bf16 *qkv, const bf16 *cosine, const bf16 *sine, bf16 *out, float *total,
               int64_t threads, float *rooms, int64_t size) {
    const float factor = 1 / sqrtf(D);
    const int64_t H = K * G, stride = (H + 2 * K) * D;
#pragma omp parallel num_threads(threads)
    {
        start_tiles();
#pragma omp for schedule(dynamic)
        for (int64_t unit = 0; unit < count * K; unit++) {
            Unit u = unit_of(unit, K, lengths, qkv, cosine, sine, rooms, size);
            int64_t start = u.start, h = u.h, n = u.n, m = u.m;
            const bf16 *x = u.x, *c = u.c, *s = u.s;
            float *room = u.room, *score = take(&room, T * m), *y = take(&room, T * W);
            bf16 *p = take_half(&room, T * m), *q = take_half(&room, T * W);
            bf16 *rows = take_half(&room, m * W), *k = take_half(&room, m * W), *v = take_half(&room, m * W);
            gather(n, m, x + (H + h) * D, stride, c, s, rows);
            turned_pairs(m, rows, k);
            gather(n, m, x + (H + K + h) * D, stride, NULL, NULL, rows);
            pairs(m, W, rows, v);
            for (int64_t g = h * G; g < (h + 1) * G; g++)
                for (int64_t first = 0; first < n; first += T) {
                    int64_t end = first + T, here = least(T, n - first);
                    gather(here, T, x + first * stride + g * D, stride, c + first * (D / 2), s + first * (D / 2), q);
                    product(T, end, W, q, W, k, m, score, 0);
                    float sum[T];
                    for (int64_t r = 0; r < T; r++) {
                        float *row = score + r * end, top = -INFINITY;
                        for (int64_t j = first + r + 1; j < end; j++) row[j] = -INFINITY;
#pragma omp simd reduction(max:top)  /* else no vectors: the order matters for NaN, which here reaches the sum in any case */
                        for (int64_t j = 0; j < end; j++) top = row[j] > top ? row[j] : top;
                        sum[r] = 0;
                        for (int64_t j = 0; j < end; j++) sum[r] += row[j] = exp_((row[j] - top) * factor);
                        for (int64_t j = 0; j < end; j++) p[r * end + j] = put(row[j]);
                        memset(p + r * end + first + r + 1, 0, (T - r - 1) * sizeof(bf16));
                        if (r < here) total[(start + first + r) * H + g] = top * factor + logf(sum[r]);
                    }
                    product(T, W, end, p, end, v, W, y, 0);
                    for (int64_t r = 0; r < here; r++)
                        for (int64_t i = 0; i < D; i++) out[((start + first + r) * H + g) * D + i] = put(y[r * W + i] / sum[r]);
                }
        }
        end_tiles();
    }
}

/* grad [N, H, D] of out -> grad_qkv. Keys are the rows here, so that a column of these products is one query's. */
void attention_backward(int64_t count, int64_t K, const int64_t *lengths, const bf16 *qkv, const bf16 *cosine, const bf16 *sine, const bf16 *out,
                        const float *total, const bf16 *grad, bf16 *grad_qkv, int64_t threads, float *rooms, int64_t size) {
    const float factor = 1 / sqrtf(D);
    const int64_t H = K * G, stride = (H + 2 * K) * D;
#pragma omp parallel num_threads(threads)
    {
        start_tiles();
#pragma omp for schedule(dynamic)
        for (int64_t unit = 0; unit < count * K; unit++) {
            Unit u = unit_of(unit, K, lengths, qkv, cosine, sine, rooms, size);
            int64_t start = u.start, h = u.h, n = u.n, m = u.m;
            const bf16 *x = u.x, *c = u.c, *s = u.s;
            bf16 *to = grad_qkv + start * stride, one[D];
            float *room = u.room, *p = take(&room, m * T), *dp = take(&room, m * T);
            float *dk = take(&room, m * W), *dv = take(&room, m * W), *dq = take(&room, W * T);
            bf16 *k = take_half(&room, m * W), *v = take_half(&room, m * W), *turned = take_half(&room, W * m);
            bf16 *probability = take_half(&room, m * T), *ds = take_half(&room, m * T), *ds_pairs = take_half(&room, m * T);
            bf16 *rows = take_half(&room, T * W), *q = take_half(&room, T * W), *q_turned = take_half(&room, T * W);
            bf16 *dy = take_half(&room, T * W), *dy_turned = take_half(&room, T * W);
            gather(n, m, x + (H + h) * D, stride, c, s, k);
            gather(n, m, x + (H + K + h) * D, stride, NULL, NULL, v);
            for (int64_t j = 0; j < m; j += T)
                for (int64_t i = 0; i < W; i += T) turn_block(T, T, k + j * W + i, W, turned + i * m + j, m);
            memset(dk, 0, m * W * sizeof(float)), memset(dv, 0, m * W * sizeof(float));
            for (int64_t g = h * G; g < (h + 1) * G; g++)
                for (int64_t first = 0; first < n; first += T) {
                    int64_t end = first + T, here = least(T, n - first), at = (start + first) * H + g;
                    gather(here, T, x + first * stride + g * D, stride, c + first * (D / 2), s + first * (D / 2), rows);
                    pairs(T, W, rows, q), turned_pairs(T, rows, q_turned);
                    gather(here, T, grad + at * D, H * D, NULL, NULL, rows);
                    pairs(T, W, rows, dy), turned_pairs(T, rows, dy_turned);
                    float log_sum[T] = {0}, dot[T] = {0};
                    for (int64_t r = 0; r < here; r++) {
                        log_sum[r] = total[at + r * H];
                        for (int64_t i = 0; i < D; i++) dot[r] += get(rows[r * W + i]) * get(out[(at + r * H) * D + i]);
                    }
                    product(end, T, W, k, W, q_turned, T, p, 0);
                    product(end, T, W, v, W, dy_turned, T, dp, 0);
                    for (int64_t j = 0; j < end; j++)
                        for (int64_t r = 0; r < T; r++) {
                            int seen = j <= first + r && r < here;
                            float e = exp_(p[j * T + r] * factor - log_sum[r]), d = e * (dp[j * T + r] - dot[r]) * factor;
                            probability[j * T + r] = seen ? put(e) : 0;
                            ds[j * T + r] = seen ? put(d) : 0;
                        }
                    product(end, W, T, probability, T, dy, W, dv, 1);
                    product(end, W, T, ds, T, q, W, dk, 1);
                    pairs(end, T, ds, ds_pairs);
                    product(W, T, end, turned, m, ds_pairs, T, dq, 0);
                    for (int64_t r = 0; r < here; r++) {
                        for (int64_t i = 0; i < D; i++) one[i] = put(dq[i * T + r]);
                        rotate(one, c + (first + r) * (D / 2), s + (first + r) * (D / 2), -1, to + (first + r) * stride + g * D);
                    }
                }
            for (int64_t r = 0; r < n; r++) {
                for (int64_t i = 0; i < D; i++) one[i] = put(dk[r * W + i]);
                rotate(one, c + r * (D / 2), s + r * (D / 2), -1, to + r * stride + (H + h) * D);
                for (int64_t i = 0; i < D; i++) to[r * stride + (H + K + h) * D + i] = put(dv[r * W + i]);
            }
        }
        end_tiles();
    }
}

/* One piece of the vocabulary, `size` tokens from `first` on: logits [n, size] * factor go into each row's running maximum `top`, `sum` of the
   exponentials below it, and (unless NULL) `mean`, the sum of these times their exponents; target [n], if inside, gets its logit. */
void token_logprob(int64_t n, int64_t size, int64_t first, float factor, const bf16 *logits, const int64_t *targets, float *top, float *sum,
                   float *mean, float *logit) {
#pragma omp parallel for
    for (int64_t r = 0; r < n; r++) {
        const bf16 *row = logits + r * size;
        float piece = max_(row, size) * factor, most = piece > top[r] ? piece : top[r], part = 0, weighted = 0;
        float less = top[r] - most, keep = exp_(less);
        if (mean) {
            for (int64_t i = 0; i < size; i++) {
                float x = get(row[i]) * factor - most, e = exp_(x);
                part += e;
                weighted += e * x;
            }
            mean[r] = keep * (mean[r] + less * sum[r]) + weighted;
        } else
            for (int64_t i = 0; i < size; i++) part += exp_(get(row[i]) * factor - most);
        sum[r] = keep * sum[r] + part;
        top[r] = most;
        if (targets[r] >= first && targets[r] < first + size) logit[r] = get(row[targets[r] - first]) * factor;
    }
}

/* grad [n] of the log-probabilities, and grad_entropy [n] of the entropies [n] or NULL -> of this piece's logits, in their place;
   total [n]: the log of the whole sum of exponentials */
void token_logprob_backward(int64_t n, int64_t size, int64_t first, float factor, bf16 *logits, const int64_t *targets, const float *total, const float *grad,
                            const float *entropy, const float *grad_entropy) {
#pragma omp parallel for
    for (int64_t r = 0; r < n; r++) {
        bf16 *row = logits + r * size;
        int64_t target = targets[r] - first, inside = target >= 0 && target < size;
        float g = grad[r] * factor, at_target = inside ? get(row[target]) * factor - total[r] : 0;
        if (!grad_entropy) {
            for (int64_t i = 0; i < size; i++) row[i] = put(-g * exp_(get(row[i]) * factor - total[r]));
            if (inside) row[target] = put(g * (1 - exp_(at_target)));
            continue;
        }
        float e = grad_entropy[r] * factor, shift = entropy[r] - total[r];
        for (int64_t i = 0; i < size; i++) {
            float x = get(row[i]) * factor;
            row[i] = put(-(g + e * (x + shift)) * exp_(x - total[r]));
        }
        if (inside) row[target] = put(g * (1 - exp_(at_target)) - e * (at_target + entropy[r]) * exp_(at_target));
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
                sum += x <= -87 ? 0 : exp_(x);  /* such a token must not be taken, not even for u = 0 */
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
void decode_attention(int64_t n, int64_t K, const bf16 *qkv, const bf16 *cosine, const bf16 *sine, const int64_t *positions,
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
                    for (int i = 0; i < D; i += 32) __builtin_prefetch(key + 32 * D + i);  /* 32 positions ahead, to hide the memory's latency */
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
