// One step of a decoder on a CPU: Llama, Qwen2, Qwen3 and Baichuan-M1, from ids to logits; and of an
// EAGLE-3 draft beside it, whose keys and values are kept with the target's.
//
// Compiled once for each instruction path; `build.py` loads the best one that this processor has.
// No order of summation depends on how many rows a step has, and activations are quantised row by
// row: batched, chunked and plain steps give the same bits.
//
// A weight matrix is cut into tiles of 16 outputs. A tile is a stream of blocks, one for each
// group of 32, 64 or 128 inputs:
//     16 scales (float16), 16 minima (float16, asymmetric only),
//     then for each 32 inputs the integers, 4 neighbouring inputs of an output side by side:
//         8 bits: [8][16 outputs][4 inputs];  4 bits: [4][16][4], the low nibbles inputs 0 to 15,
//         the high nibbles inputs 16 to 31.
// weight = scale * (integer - zero) + minimum, where zero is 0 in asymmetric matrices, else the
// middle: 8 or 128. A width that is no multiple is padded with zeros; activations there are 0.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <numeric>
#include <thread>
#include <vector>

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#include <immintrin.h>
#endif

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define WIDTH 16
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define WIDTH 8
#else
#define WIDTH 4
#endif

#if defined(__x86_64__)  // how an assembler statement names a vector
#define VECTOR "x"
#else
#define VECTOR "m"
#endif

namespace {

constexpr int W = WIDTH;              // float32 lanes of a vector
constexpr int TILE = 16;              // outputs of a tile
constexpr int GROUP = 32;             // activations that share a scale
constexpr int PAGE = 64;              // tokens of a cache page
constexpr int PAD = 128;              // rows of activations end at a multiple, in zeros
constexpr float LEAST_PEAK = 1e-30f;  // below it 127 / peak overflows: such groups are zeros
constexpr int BLOCK_ROWS = 8;         // rows that one attention task takes
constexpr int MOST_HEAD = 512;        // values of a head

typedef float F __attribute__((vector_size(4 * WIDTH)));
typedef int32_t I __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t U __attribute__((vector_size(4 * WIDTH)));  // wraps around
typedef float LooseF __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef int32_t LooseI __attribute__((vector_size(4 * WIDTH), aligned(1), may_alias));
typedef int8_t Bytes __attribute__((vector_size(WIDTH)));
typedef int8_t LooseBytes __attribute__((vector_size(WIDTH), aligned(1), may_alias));
typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH)));
typedef uint16_t LooseHalves __attribute__((vector_size(2 * WIDTH), aligned(2), may_alias));
typedef uint16_t half;

constexpr int64_t padded(int64_t n, int64_t multiple) {
    return (n + multiple - 1) / multiple * multiple;
}

// ---------------------------------------------------------------- vectors

inline F load(const float* p) { return *reinterpret_cast<const LooseF*>(p); }
inline void store(float* p, F v) { *reinterpret_cast<LooseF*>(p) = v; }
inline I load_bytes(const uint8_t* p) { return *reinterpret_cast<const LooseI*>(p); }
inline F splat(float x) { return F{} + x; }
inline I splat(int32_t x) { return I{} + x; }
inline F to_float(I v) { return __builtin_convertvector(v, F); }

// Never left to the compiler, which could decide differently in two places.
inline F fma(F a, F b, F c) {
#if WIDTH == 16
    return _mm512_fmadd_ps(a, b, c);
#elif WIDTH == 8
    return _mm256_fmadd_ps(a, b, c);
#else
    return a * b + c;
#endif
}

inline F larger(F a, F b) { return a > b ? a : b; }

inline F widen(const half* p) {
#if WIDTH == 16
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif WIDTH == 8
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    // Exponents are re-biased by a product, which is right for subnormal numbers too.
    I h = __builtin_convertvector(*reinterpret_cast<const LooseHalves*>(p), I);
    F magnitude = reinterpret_cast<F>((h & 0x7fff) << 13) * 0x1p112f;
    return reinterpret_cast<F>(reinterpret_cast<I>(magnitude) | ((h & 0x8000) << 16));
#endif
}

inline F widen(const int8_t* p) {
#if WIDTH == 16
    return _mm512_cvtepi32_ps(
        _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#endif
    return __builtin_convertvector(*reinterpret_cast<const LooseBytes*>(p), F);
}

// To the nearest float16, ties to even; what is too large becomes the largest.
inline void narrow(half* p, F v) {
    v = v > 65504.0f ? splat(65504.0f) : v;
    v = v < -65504.0f ? splat(-65504.0f) : v;
#if WIDTH == 16
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif WIDTH == 8
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
    I bits = reinterpret_cast<I>(v), sign = (bits >> 16) & 0x8000;
    bits &= 0x7fffffff;
    I normal = (bits - (112 << 23) + 0xfff + ((bits >> 13) & 1)) >> 13;
    I small = reinterpret_cast<I>(reinterpret_cast<F>(bits) + 0.5f) - 0x3f000000;
    I result = (bits < (113 << 23) ? small : normal) | sign;
    *reinterpret_cast<LooseHalves*>(p) = __builtin_convertvector(result, Halves);
#endif
}

// To the nearest integer, ties to even; |v| < 2^22.
inline I rounded(F v) {
    return reinterpret_cast<I>(reinterpret_cast<U>(v + 12582912.0f) - 0x4b400000u);
}

// Over the lanes, always in the same order: pairwise, halves first.
template <class Join>
inline float over_lanes(F v, Join&& join) {
    float lanes[W];
    store(lanes, v);
    for (int width = W / 2; width; width /= 2)
        for (int i = 0; i < width; ++i) lanes[i] = join(lanes[i], lanes[i + width]);
    return lanes[0];
}

inline float sum(F v) {
#if WIDTH == 16
    return _mm512_reduce_add_ps(v);
#else
    return over_lanes(v, [](float a, float b) { return a + b; });
#endif
}

inline float largest(F v) {
#if WIDTH == 16
    return _mm512_reduce_max_ps(v);
#else
    return over_lanes(v, [](float a, float b) { return std::max(a, b); });
#endif
}

// e^v within 2 units in the last place; exactly 1 at 0, exactly 0 below -87.
inline F exponential(F v) {
    F x = v < -87.0f ? splat(-87.0f) : v > 88.0f ? splat(88.0f) : v;
    I n = rounded(x * 1.44269504f);
    F k = to_float(n);
    F r = fma(k, splat(-0.693359375f), x);
    r = fma(k, splat(2.12194440e-4f), r);
    F p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p * r, r, r) + 1.0f;
    F scaled = p * reinterpret_cast<F>((reinterpret_cast<U>(n) + 127u) << 23);
    return v < -87.0f ? F{} : scaled;
}

// acc + the four products of neighbouring bytes: w of each lane, unsigned, of BITS; a of all, signed.
// After at most eight of them, from 0, `group_sum` makes a group's sum of it.
template <int BITS>
inline I dot4(I acc, I w, const int8_t* a) {
    int32_t four;
    std::memcpy(&four, a, 4);
#if WIDTH == 16
    return reinterpret_cast<I>(_mm512_dpbusd_epi32(
        reinterpret_cast<__m512i>(acc), reinterpret_cast<__m512i>(w), _mm512_set1_epi32(four)));
#elif WIDTH == 8
    __m256i u = reinterpret_cast<__m256i>(w), s = _mm256_set1_epi32(four),
            sum = reinterpret_cast<__m256i>(acc);
    // Of 4 bits eight pairs fit into 16: 8 * 2 * 15 * 127.
    if (BITS == 4)
        return reinterpret_cast<I>(_mm256_add_epi16(sum, _mm256_maddubs_epi16(u, s)));
    // Of 8 bits not one pair does, but of w - 128: 2 * 128 * 127. Its sign goes to a.
    u = _mm256_xor_si256(u, _mm256_set1_epi8(-128));
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(u), _mm256_sign_epi8(s, u));
    return acc + reinterpret_cast<I>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#else
    for (int j = 0; j < 4; ++j) acc += ((w >> (8 * j)) & 255) * a[j];
    return acc;
#endif
}

// What `dot4` made of a group: the sum of a times w, or, without a MINIMUM, times w less its middle.
// offset: -8 times the sum of a.
template <int BITS, bool MINIMUM>
inline I group_sum(I acc, int32_t offset) {
    int32_t middle = BITS == 4 ? offset : 16 * offset;
#if WIDTH == 8
    if (BITS == 8) return MINIMUM ? acc - splat(middle) : acc;
    acc = reinterpret_cast<I>(
        _mm256_madd_epi16(reinterpret_cast<__m256i>(acc), _mm256_set1_epi16(1)));
#endif
    return MINIMUM ? acc : acc + splat(middle);
}

}  // namespace

// ---------------------------------------------------------------- what Python hands over

extern "C" {

struct Matrix {
    const uint8_t* data;  // tiles; null: there is none
    const float* bias;    // [outputs] padded to tiles, or null
    int32_t outputs, inputs, bits, group, has_minimum;
};

struct Layer {
    int32_t heads, kv_heads, head_dim, window, page_group, rope;  // window 0: all before
    int32_t first;                                                // slots before it are not seen
    float norm_eps;
    const float *input_norm, *post_norm, *q_norm, *k_norm, *conv_k, *conv_v;  // or null
    Matrix qkv, out, gate_up, down;  // gate and up by turns, a tile of each
};

// EAGLE-3 (arXiv 2503.01840). Its row at slot s takes token s beside what precedes it: `fc` of the
// target's features of s - 1, or its own last state.
struct Draft {
    int32_t words;
    const int32_t* target_ids;  // [words]
    const float *hidden_norm, *norm;
    Matrix fc, head, embedding;
};

struct Model {
    int32_t layers, hidden, vocab, threads, rope_sizes, int8_activations, int8_kv;
    int32_t kept_rows;  // of a page's last raw rows and draft's states; slot s at s % kept_rows
    float norm_eps;
    const int32_t* num_pages;         // of each page group
    const int32_t* rope_dims;         // [rope_sizes] head sizes
    const float* rope_factors;        // [rope_sizes]
    const float* const* frequencies;  // [rope_sizes] -> [head size / 2]
    const Layer* layer;               // [layers], and the draft's
    const float* norm;
    Matrix embedding, head;
    const Draft* draft;  // or null
    int32_t features;    // what it reads, or is looked at: the stream before these layers
    const int32_t* feature_layers;
};

struct Batch {
    int32_t rows, spans, wanted;
    const int32_t *ids, *starts, *cached;  // [rows], [spans + 1], [spans]
    const int32_t* const* pages;     // of each page group [spans][table], -1: given back
    int32_t table;
    const int32_t* wanted_rows;  // [wanted]
};
}

namespace {

// ---------------------------------------------------------------- threads

// Every thread runs the whole step; they meet at barriers.
class Crew {
 public:
    explicit Crew(int count) : count_(count) {
        try {
            for (int id = 1; id < count; ++id) threads_.emplace_back([this, id] { follow(id); });
        } catch (...) {
            dismiss();
            throw;
        }
    }

    ~Crew() { dismiss(); }

    int count() const { return count_; }

    template <class Job>
    void run(Job&& job) {
        auto call = [](void* it, int id) { (*static_cast<std::remove_reference_t<Job>*>(it))(id); };
        argument_ = &job;
        job_ = call;
        if (count_ > 1) {
            round_.fetch_add(1);
            round_.notify_all();
        }
        call(&job, 0);
        barrier();
    }

    void barrier() {
        if (count_ == 1) return;
        uint32_t phase = phase_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1) == count_ - 1) {
            arrived_.store(0, std::memory_order_relaxed);
            phase_.fetch_add(1);
            phase_.notify_all();
        } else {
            await(phase_, phase);
        }
    }

 private:
    void dismiss() {
        job_ = nullptr;
        round_.fetch_add(1);
        round_.notify_all();
        for (auto& thread : threads_) thread.join();
    }

    // Spins for some microseconds. Then the one that is waited for may have no core, or this very
    // one: it is offered, again and again, and after a while left.
    static void await(std::atomic<uint32_t>& what, uint32_t old) {
        for (int spin = 0; spin < 100; ++spin) {
            if (what.load(std::memory_order_acquire) != old) return;
#if WIDTH > 4
            _mm_pause();
#endif
        }
        for (int offer = 0; offer < 500; ++offer) {
            if (what.load(std::memory_order_acquire) != old) return;
            std::this_thread::yield();
        }
        while (what.load(std::memory_order_acquire) == old) what.wait(old);
    }

    void follow(int id) {
        for (uint32_t round = 0;; ++round) {
            await(round_, round);
            if (!job_) return;
            job_(argument_, id);
            barrier();
        }
    }

    int count_;
    std::vector<std::thread> threads_;
    alignas(64) std::atomic<uint32_t> round_{0};
    alignas(64) std::atomic<uint32_t> phase_{0};
    alignas(64) std::atomic<int> arrived_{0};
    void (*job_)(void*, int) = nullptr;
    void* argument_ = nullptr;
};

// ---------------------------------------------------------------- activations

constexpr int MOST_ROWS = W == 16 ? 12 : 4;  // that a product takes at once: all accumulators fit

// Rows of a panel: what lies side by side is read with one pointer.
inline int64_t panel_of(int64_t rows) {
    if (W == 8 && (rows == 3 || rows == 6)) return 3;  // a draft's 2 or 5 proposals and a token
    for (int64_t size : {12, 8, 4, 2})
        if (size <= MOST_ROWS && size <= rows) return size;
    return 1;
}

// Rows ready for a product: int8 with a scale for each 32, or float32; both with their sums.
// Rows lie in panels: [panels][inputs / 4][rows of a panel][4] bytes, [panels][inputs][rows]
// floats, [panels][groups][rows] of the rest.
struct Activations {
    std::vector<int8_t> bytes;
    std::vector<float> floats, scales, sums;  // sums: of what the integers stand for
    std::vector<int32_t> offsets;             // -8 times the sum of the integers
    int64_t stride = 0, groups = 0;

    void reserve(int64_t rows, int64_t widest, bool int8) {
        stride = padded(widest, PAD);
        groups = stride / GROUP;
        rows += MOST_ROWS;  // the last panel may be whole
        if (int8)
            bytes.resize(rows * stride), scales.resize(rows * groups),
                offsets.resize(rows * groups);
        else
            floats.resize(rows * stride);
        sums.resize(rows * groups);
    }

    // Row `row` of `rows`: x [inputs], and zeros after them to PAD.
    void set(int64_t row, int64_t rows, const float* x, int64_t inputs, bool int8) {
        int64_t panel = panel_of(rows), first = row / panel * panel, at = row % panel;
        int64_t count = padded(inputs, PAD) / GROUP;
        float edge[GROUP], *total = &sums[first * groups + at];
        if (!int8) {
            float* to = &floats[first * stride + at];
            for (int64_t g = 0; g < count; ++g, to += GROUP * panel) {
                const float* from = group(x, g, inputs, edge);
                F all{};
                for (int i = 0; i < GROUP; i += W) all += load(from + i);
                total[g * panel] = sum(all);
                for (int i = 0; i < GROUP; ++i) to[i * panel] = from[i];
            }
            return;
        }
        int8_t* to = &bytes[first * stride + 4 * at];
        float* scale = &scales[first * groups + at];
        int32_t* offset = &offsets[first * groups + at];
        for (int64_t g = 0; g < count; ++g, to += GROUP * panel) {
            const float* from = group(x, g, inputs, edge);
            F most{}, strange{};  // a NaN as soon as a value is no number: maxima lose it
            for (int i = 0; i < GROUP; i += W) {
                most = larger(most, larger(load(from + i), -load(from + i)));
                strange = fma(load(from + i), F{}, strange);
            }
            float peak = largest(most) + sum(strange);
            float inverse = peak > LEAST_PEAK && peak < INFINITY ? 127.0f / peak : 0.0f;
            int8_t values[GROUP];
            I all{};
            for (int i = 0; i < GROUP; i += W) {
                I q = inverse > 0 ? rounded(load(from + i) * inverse) : I{};
                all += q;
                *reinterpret_cast<LooseBytes*>(values + i) = __builtin_convertvector(q, Bytes);
            }
            for (int i = 0; i < GROUP; i += 4) std::memcpy(to + i * panel, values + i, 4);
            int32_t lanes[W], whole = 0;
            *reinterpret_cast<LooseI*>(lanes) = all;
            for (int i = 0; i < W; ++i) whole += lanes[i];
            scale[g * panel] = peak / 127.0f;
            total[g * panel] = peak / 127.0f * static_cast<float>(whole);
            offset[g * panel] = -8 * whole;
        }
    }

    // The inputs of a group, or a copy with zeros after the last.
    static const float* group(const float* x, int64_t g, int64_t inputs, float* edge) {
        int64_t left = inputs - g * GROUP;
        if (left >= GROUP) return x + g * GROUP;
        std::fill_n(edge, GROUP, 0.0f);
        std::copy_n(x + g * GROUP, std::max<int64_t>(left, 0), edge);
        return edge;
    }
};

// ---------------------------------------------------------------- products

struct Tiles {  // what follows from a Matrix
    int64_t count, blocks, per_block, block_bytes, bytes;

    explicit Tiles(const Matrix& m)
        : count(padded(m.outputs, TILE) / TILE),
          blocks(padded(m.inputs, m.group) / m.group),
          per_block(m.group / GROUP),
          block_bytes((m.has_minimum ? 4 : 2) * TILE + per_block * m.bits * 64),
          bytes(blocks * block_bytes) {}
};

// R rows of a panel by W outputs of a tile; `lane` is the first of the W among the 16.
template <int R, bool WHOLE, int BITS, bool MINIMUM, bool INT8>
inline void multiply(const Tiles& tiles, const uint8_t* block, int lane, const Activations& x,
                     int64_t row, int64_t rows, F* result) {
    const int64_t panel = WHOLE ? R : panel_of(rows);
    int64_t first = row / panel * panel, at = row % panel;
    const int8_t* bytes = x.bytes.data() + first * x.stride + 4 * at;
    const float* floats = x.floats.data() + first * x.stride + at;
    const float* scales = x.scales.data() + first * x.groups + at;
    const float* sums = x.sums.data() + first * x.groups + at;
    const int32_t* offsets = x.offsets.data() + first * x.groups + at;
    F total[R] = {};
    for (int64_t b = 0; b < tiles.blocks; ++b, block += tiles.block_bytes) {
        F scale = widen(reinterpret_cast<const half*>(block) + lane), minimum{};
        if constexpr (MINIMUM) minimum = widen(reinterpret_cast<const half*>(block) + TILE + lane);
        // The next tile comes from memory while this one is computed, mostly by this thread.
        if (lane + W == TILE && !row)
            for (int64_t i = 0; i < tiles.block_bytes; i += 64)
                __builtin_prefetch(block + tiles.bytes + i);
        const uint8_t* q = block + (MINIMUM ? 4 : 2) * TILE + 4 * lane;
        for (int64_t s = 0; s < tiles.per_block; ++s, q += BITS * 64) {
            if constexpr (INT8) {
                I dot[R] = {};
                for (int i = 0; i < BITS; ++i, bytes += 4 * panel) {
                    I w = load_bytes(q + 64 * i);
                    if constexpr (BITS == 4) {
                        I low = w & 0x0f0f0f0f, high = (w >> 4) & 0x0f0f0f0f;
                        for (int r = 0; r < R; ++r) dot[r] = dot4<4>(dot[r], low, bytes + 4 * r);
                        for (int r = 0; r < R; ++r)
                            dot[r] = dot4<4>(dot[r], high, bytes + 16 * panel + 4 * r);
                    } else {
                        for (int r = 0; r < R; ++r) dot[r] = dot4<8>(dot[r], w, bytes + 4 * r);
                    }
                }
                if constexpr (BITS == 4) bytes += 16 * panel;
                for (int r = 0; r < R; ++r) {
                    I all = group_sum<BITS, MINIMUM>(dot[r], offsets[r]);
                    total[r] = fma(to_float(all) * scales[r], scale, total[r]);
                    if constexpr (MINIMUM) total[r] = fma(minimum, splat(sums[r]), total[r]);
                }
                scales += panel, offsets += panel;
            } else {
                constexpr float zero = MINIMUM ? 0 : 1 << (BITS - 1);
                F part[R] = {};
                for (int i = 0; i < 8; ++i) {
                    I w = load_bytes(q + 64 * (BITS == 4 ? i & 3 : i));
                    if constexpr (BITS == 4) w = (i < 4 ? w : w >> 4) & 0x0f0f0f0f;
                    for (int j = 0; j < 4; ++j, floats += panel) {
                        F value = to_float((w >> (8 * j)) & 255) - zero;
                        for (int r = 0; r < R; ++r) part[r] = fma(value, splat(floats[r]), part[r]);
                    }
                }
                for (int r = 0; r < R; ++r) {
                    total[r] = fma(part[r], scale, total[r]);
                    if constexpr (MINIMUM) total[r] = fma(minimum, splat(sums[r]), total[r]);
                }
            }
            sums += panel;
        }
    }
    for (int r = 0; r < R; ++r) result[r] = total[r];
}

template <int R, bool WHOLE, int BITS, bool MINIMUM, bool INT8, class Sink>
inline int64_t stripes(const Tiles& tiles, const uint8_t* data, const Activations& x, int64_t row,
                       int64_t rows, Sink& sink) {
    if (WHOLE && panel_of(rows) != R) return row;
    for (; row + R <= rows; row += R)
        for (int lane = 0; lane < TILE; lane += W) {
            F result[R];
            multiply<R, WHOLE, BITS, MINIMUM, INT8>(tiles, data, lane, x, row, rows, result);
            for (int r = 0; r < R; ++r) sink(row + r, lane, result[r]);
        }
    return row;
}

// All rows by one tile, whole panels first; `sink(row, lane, values)` gets W outputs of a row.
template <int BITS, bool MINIMUM, bool INT8, class Sink>
void tile_product(const Tiles& tiles, const uint8_t* data, const Activations& x, int64_t rows,
                  Sink&& sink) {
    int64_t row = 0;
#if WIDTH == 16
    row = stripes<12, true, BITS, MINIMUM, INT8>(tiles, data, x, row, rows, sink);
    row = stripes<8, true, BITS, MINIMUM, INT8>(tiles, data, x, row, rows, sink);
#endif
    row = stripes<4, true, BITS, MINIMUM, INT8>(tiles, data, x, row, rows, sink);
#if WIDTH == 8
    row = stripes<3, true, BITS, MINIMUM, INT8>(tiles, data, x, row, rows, sink);
#endif
    row = stripes<2, true, BITS, MINIMUM, INT8>(tiles, data, x, row, rows, sink);
    row = stripes<1, true, BITS, MINIMUM, INT8>(tiles, data, x, row, rows, sink);
    row = stripes<4, false, BITS, MINIMUM, INT8>(tiles, data, x, row, rows, sink);
    row = stripes<2, false, BITS, MINIMUM, INT8>(tiles, data, x, row, rows, sink);
    stripes<1, false, BITS, MINIMUM, INT8>(tiles, data, x, row, rows, sink);
}

template <class Sink>
void product(const Matrix& m, const Tiles& tiles, int64_t tile, const Activations& x, int64_t rows,
             bool int8, Sink&& sink) {
    const uint8_t* data = m.data + tile * tiles.bytes;
    const float* bias = m.bias ? m.bias + tile * TILE : nullptr;
    auto biased = [&](int64_t row, int lane, F v) {
        sink(row, lane, bias ? v + load(bias + lane) : v);
    };
    auto choose = [&](auto bits, auto minimum) {
        if (int8)
            tile_product<bits, minimum, true>(tiles, data, x, rows, biased);
        else
            tile_product<bits, minimum, false>(tiles, data, x, rows, biased);
    };
    using Four = std::integral_constant<int, 4>;
    using Eight = std::integral_constant<int, 8>;
    if (m.bits == 4)
        m.has_minimum ? choose(Four{}, std::true_type{}) : choose(Four{}, std::false_type{});
    else
        m.has_minimum ? choose(Eight{}, std::true_type{}) : choose(Eight{}, std::false_type{});
}

// One output's weights: the embedding of a token.
void read_row(const Matrix& m, int64_t output, float* to) {
    Tiles tiles(m);
    const uint8_t* block = m.data + output / TILE * tiles.bytes;
    int64_t lane = output % TILE;
    float zero = m.has_minimum ? 0.0f : static_cast<float>(1 << (m.bits - 1));
    for (int64_t k = 0; k < m.inputs; ++k) {
        const uint8_t* at = block + k / m.group * tiles.block_bytes;
        half pair[2 * W] = {reinterpret_cast<const half*>(at)[lane]};
        if (m.has_minimum) pair[W] = reinterpret_cast<const half*>(at)[TILE + lane];
        int64_t inner = k % GROUP, sub = k % m.group / GROUP;
        const uint8_t* q = at + (m.has_minimum ? 4 : 2) * TILE + sub * m.bits * 64 + 4 * lane;
        int64_t four = inner / 4;
        uint8_t value = q[64 * (m.bits == 4 ? four & 3 : four) + inner % 4];
        if (m.bits == 4) value = four < 4 ? value & 15 : value >> 4;
        to[k] = widen(pair)[0] * (static_cast<float>(value) - zero) + widen(pair + W)[0];
    }
}

// ---------------------------------------------------------------- attention

// out [q][columns] (+)= x [q][n] times m [n][columns], Q rows of x at a time.
template <int Q, int C, class T>
inline void mix(const float* x, int64_t xs, int64_t n, const T* m, int64_t ms, float* out,
                int64_t os, bool add) {
    F acc[Q][C];
    for (int q = 0; q < Q; ++q)
        for (int c = 0; c < C; ++c) acc[q][c] = add ? load(out + q * os + c * W) : F{};
    for (int64_t i = 0; i < n; ++i, m += ms)
        for (int c = 0; c < C; ++c) {
            F v = widen(m + c * W);
            for (int q = 0; q < Q; ++q) acc[q][c] = fma(splat(x[q * xs + i]), v, acc[q][c]);
        }
    for (int q = 0; q < Q; ++q)
        for (int c = 0; c < C; ++c) store(out + q * os + c * W, acc[q][c]);
}

template <int Q, class T>
inline void mix_rows(const float* x, int64_t xs, int64_t n, const T* m, int64_t ms, int64_t columns,
                     float* out, int64_t os, bool add) {
    constexpr int C = W == 16 ? 4 : 2;
    int64_t c = 0;
    for (; c + C * W <= columns; c += C * W) mix<Q, C>(x, xs, n, m + c, ms, out + c, os, add);
    for (; c < columns; c += W) mix<Q, 1>(x, xs, n, m + c, ms, out + c, os, add);
}

template <class T>
void mix_all(const float* x, int64_t xs, int64_t n, const T* m, int64_t ms, int64_t columns,
             float* out, int64_t os, int64_t queries, bool add) {
    int64_t q = 0;
    if (W == 16)
        for (; q + 6 <= queries; q += 6)
            mix_rows<6>(x + q * xs, xs, n, m, ms, columns, out + q * os, os, add);
    for (; q + 3 <= queries; q += 3)
        mix_rows<3>(x + q * xs, xs, n, m, ms, columns, out + q * os, os, add);
    for (; q < queries; ++q) mix_rows<1>(x + q * xs, xs, n, m, ms, columns, out + q * os, os, add);
}

// Keys and values of a layer: keys [pages][kv heads][head size][64], so that a page's 64 scores
// are vectors; values [pages][kv heads][64][size padded to 16]. In 8 bits each head of a token
// has a scale.
struct Pool {
    void *keys = nullptr, *values = nullptr;
    float *key_scales = nullptr, *value_scales = nullptr;  // [pages][kv heads][64]
    float *raw_keys = nullptr, *raw_values = nullptr;      // M1: [pages][kept][heads * head size]
};

struct Scratch {  // of a thread
    std::vector<float> queries, scores, mixed, peaks, sums, fades, gate, row, embedded;
    Activations few;  // rows of a small step, which every thread makes ready for itself
};

struct Place {  // of a row
    int32_t span, slot;
};

class Engine {
 public:
    explicit Engine(const Model& model)
        : m_(model),
          crew_(model.threads),
          counters_(16 * ((model.layers + model.kept_rows + 1) * 12 + 16)),
          hidden_stride_(padded(model.hidden, PAD)) {
        widest_ = m_.hidden;
        if (m_.draft) {
            widest_ = std::max<int64_t>(2, m_.features) * m_.hidden;
            size_t pages = m_.num_pages[m_.layer[m_.layers].page_group];
            states_ = static_cast<float*>(take(pages * m_.kept_rows * hidden_stride_ * 4));
        }
        for (int i = 0; i < m_.layers + (m_.draft ? 1 : 0); ++i) {
            const Layer& layer = m_.layer[i];
            size_t pages = m_.num_pages[layer.page_group], heads = layer.kv_heads,
                   width = layer.head_dim;
            size_t each = m_.int8_kv ? 1 : 2;
            Pool pool;
            pool.keys = take(pages * heads * width * PAGE * each);
            pool.values = take(pages * heads * padded(width, TILE) * PAGE * each);
            if (m_.int8_kv) {
                pool.key_scales = static_cast<float*>(take(pages * heads * PAGE * 4));
                pool.value_scales = static_cast<float*>(take(pages * heads * PAGE * 4));
            }
            if (layer.conv_k) {
                size_t bytes = pages * m_.kept_rows * heads * width * 4;
                pool.raw_keys = static_cast<float*>(take(bytes));
                pool.raw_values = static_cast<float*>(take(bytes));
            }
            pools_.push_back(pool);
            widest_qkv_ = std::max<int64_t>(widest_qkv_, layer.qkv.outputs);
            widest_ =
                std::max<int64_t>({widest_, layer.heads * layer.head_dim, layer.down.inputs});
            largest_head_ = std::max<int64_t>(largest_head_, padded(layer.head_dim, TILE));
            most_groups_ = std::max<int64_t>(most_groups_, layer.heads / layer.kv_heads);
        }
        for (int i = 0; i < crew_.count(); ++i) {
            Scratch s;
            int64_t queries = BLOCK_ROWS * most_groups_;
            s.queries.resize(queries * largest_head_);
            s.mixed.resize(queries * largest_head_);
            s.scores.resize(queries * PAGE);
            s.peaks.resize(queries);
            s.sums.resize(queries);
            s.fades.resize(queries + W);  // read by whole vectors
            s.row.resize(std::max<int64_t>(2 * hidden_stride_, padded(largest_head_, PAD)));
            s.embedded.resize(hidden_stride_);
            scratch_.push_back(std::move(s));
        }
    }

    void step(const Batch& batch, float* logits, float* features) {
        b_ = &batch;
        logits_ = logits;
        reserve(batch.rows);
        prepare();
        for (auto& counter : counters_) counter.store(0, std::memory_order_relaxed);
        crew_.run([this](int id) { Turn{*this, id, 0}.run(); });
        if (features) std::copy_n(features_.data(), int64_t(batch.rows) * m_.features * m_.hidden, features);
    }

    // Of spans of one token what the draft believes to follow: ids [spans][depth].
    void propose(const Batch& batch, int64_t depth, int32_t* ids) {
        b_ = &batch;
        reserve(batch.rows);
        prepare();
        for (auto& counter : counters_) counter.store(0, std::memory_order_relaxed);
        crew_.run([&](int id) { Turn{*this, id, 0}.propose(depth, ids); });
    }

 private:
    void* take(size_t bytes) {  // zeroed, and not there before it is touched
        void* block = std::calloc(std::max<size_t>(bytes, 64), 1);
        if (!block) throw std::bad_alloc();
        blocks_.emplace_back(block, &std::free);
        return block;
    }

    void reserve(int64_t rows) {
        if (rows <= capacity_) return;
        qkv_stride_ = padded(widest_qkv_, TILE);
        wide_stride_ = padded(widest_, PAD);
        hidden_.assign(rows * hidden_stride_, 0.0f);
        qkv_.assign(rows * qkv_stride_, 0.0f);
        wide_.assign(rows * wide_stride_, 0.0f);
        acts_.reserve(rows, widest_, m_.int8_activations);
        for (auto& s : scratch_) s.few.reserve(MOST_ROWS, widest_, m_.int8_activations);
        features_.assign(rows * m_.features * m_.hidden, 0.0f);
        if (m_.draft) words_.assign(rows * padded(m_.draft->words, TILE), 0.0f);
        places_.resize(rows);
        order_.resize(rows);
        angles_.resize(m_.rope_sizes);
        for (int i = 0; i < m_.rope_sizes; ++i) angles_[i].resize(rows * m_.rope_dims[i]);
        for (auto& s : scratch_) s.gate.resize(rows * TILE);
        capacity_ = rows;  // only now: a failure above leaves nothing half done
    }

    // Where each row goes; rows of spans whose pages begin alike come to lie side by side, so
    // that a shared page is read once for all of them.
    void prepare() {
        const Batch& b = *b_;
        std::vector<int32_t>& spans = span_order_;
        spans.resize(b.spans);
        std::iota(spans.begin(), spans.end(), 0);
        const int32_t* table = b.pages[0];
        std::sort(spans.begin(), spans.end(), [&](int32_t one, int32_t two) {
            const int32_t *p = table + int64_t(one) * b.table, *q = table + int64_t(two) * b.table;
            auto [x, y] = std::mismatch(p, p + b.table, q);
            return x == p + b.table ? one < two : *x < *y;
        });
        is_single_ = true;
        for (int32_t span : spans) is_single_ &= b.starts[span + 1] - b.starts[span] == 1;
        int64_t at = 0;
        for (int32_t span : spans)
            for (int32_t row = b.starts[span]; row < b.starts[span + 1]; ++row) {
                places_[row] = {span, b.cached[span] + row - b.starts[span]};
                order_[at++] = row;
            }
    }

    int32_t page(int group, int32_t span, int64_t index) const {
        return b_->pages[group][int64_t(span) * b_->table + index];
    }

    // A thread's way through the step. All threads take the same turns; `each` deals them out.
    struct Turn {
        Engine& e;
        int id;
        int64_t phase;

        template <class Work>
        void each(int64_t count, int64_t grain, Work&& work) {
            std::atomic<int64_t>& next = e.counters_[16 * phase++];
            for (int64_t i; (i = next.fetch_add(grain, std::memory_order_relaxed)) < count;)
                for (int64_t j = i; j < std::min(i + grain, count); ++j) work(j);
            e.crew_.barrier();
        }

        int64_t grain(int64_t count) const {
            return std::max<int64_t>(1, count / (8 * e.crew_.count()));
        }

        // Rows of a panel share cache lines: one thread writes them all.
        template <class Work>
        void each_row(int64_t rows, Work&& work) {
            each(rows, padded(grain(rows), panel_of(rows)), work);
        }

        // Makes rows ready for a product. Few are done by every thread for itself: sooner than a
        // barrier.
        template <class Work>
        void ready(int64_t rows, Work&& work) {
            if (rows > MOST_ROWS) return each_row(rows, [&](int64_t row) { work(row, e.acts_); });
            for (int64_t row = 0; row < rows; ++row) work(row, e.scratch_[id].few);
        }

        const Activations& acts(int64_t rows) const {
            return rows > MOST_ROWS ? e.acts_ : e.scratch_[id].few;
        }

        template <class Sink>
        void products(const Matrix& m, int64_t rows, Sink&& sink, int64_t first = 0) {
            Tiles tiles(m);
            each(tiles.count - first, grain(tiles.count - first), [&](int64_t at) {
                int64_t tile = first + at;
                product(m, tiles, tile, acts(rows), rows, e.m_.int8_activations,
                        [&](int64_t row, int lane, F v) { sink(row, tile * TILE + lane, v); });
            });
        }

        void run() {
            const Model& m = e.m_;
            const Batch& b = *e.b_;
            int64_t rows = b.rows;  // later: those whose logits are asked for
            each(rows, grain(rows), [&](int64_t row) {
                read_row(m.embedding, b.ids[row], &e.hidden_[row * e.hidden_stride_]);
                e.turn_angles(row);
            });
            bool reads_last = e.is_feature(m.layers);
            for (int i = 0; i < m.layers; ++i) {
                const Layer& layer = m.layer[i];
                capture(i, rows);
                ready(rows, [&](int64_t row, Activations& to) {
                    e.normalise(id, row, rows, layer.input_norm, m.norm_eps, to);
                });
                project(layer, rows, 0);
                bool alone = e.is_single_;  // no row reads what another one places
                if (!alone) place(i, rows);
                attend(i, rows, alone);
                if (layer.conv_k && id == 0) e.keep_raw(i);
                if (i == m.layers - 1 && b.wanted < rows && !reads_last) rows = keep_wanted();
                finish(layer, rows);
            }
            capture(m.layers, rows);
            if (b.wanted < rows) keep_wanted();
            ready(b.wanted,
                  [&](int64_t i, Activations& to) {
                      e.normalise(id, i, b.wanted, m.norm, m.norm_eps, to);
                  });
            products(m.head, b.wanted, [&](int64_t row, int64_t column, F v) {
                float* to = e.logits_ + row * m.vocab + column;
                if (column + W <= m.vocab)
                    store(to, v);
                else
                    for (int64_t j = 0; column + j < m.vocab; ++j) to[j] = v[j];
            });
            if (m.draft) remember();
        }

        void project(const Layer& layer, int64_t rows, int64_t first) {
            auto keep = [&](int64_t row, int64_t column, F v) {
                store(&e.qkv_[row * e.qkv_stride_ + column], v);
            };
            products(layer.qkv, rows, keep, first);
        }

        void place(int index, int64_t rows) {
            int64_t heads = e.m_.layer[index].kv_heads;
            each(rows * heads, grain(rows) * heads,
                 [&](int64_t at) { e.place(id, index, at / heads, at % heads); });
        }

        void attend(int index, int64_t rows, bool alone) {
            int64_t blocks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS,
                    heads = e.m_.layer[index].kv_heads;
            each(blocks * heads, 1, [&](int64_t task) {
                e.attend(id, index, task % heads, task / heads * BLOCK_ROWS, alone);
            });
        }

        // What attention found goes into the residual stream, then through the MLP.
        void finish(const Layer& layer, int64_t rows) {
            int64_t width = layer.heads * layer.head_dim;
            ready(rows, [&](int64_t row, Activations& to) { e.quantise(row, rows, width, to); });
            auto add = [&](int64_t row, int64_t column, F v) {
                float* x = &e.hidden_[row * e.hidden_stride_ + column];
                store(x, load(x) + v);
            };
            products(layer.out, rows, add);
            ready(rows, [&](int64_t row, Activations& to) {
                e.normalise(id, row, rows, layer.post_norm, layer.norm_eps, to);
            });
            gate_up(layer.gate_up, rows);
            ready(rows, [&](int64_t row, Activations& to) {
                e.quantise(row, rows, layer.down.inputs, to);
            });
            products(layer.down, rows, add);
        }

        // A draft's features: the residual stream that a layer is about to read.
        void capture(int layer, int64_t rows) {
            const Model& m = e.m_;
            for (int64_t f = 0, size = m.hidden; f < m.features; ++f)
                if (m.feature_layers[f] == layer)
                    each(rows, grain(rows), [&](int64_t row) {
                        std::copy_n(&e.hidden_[row * e.hidden_stride_], size,
                                    &e.features_[(row * m.features + f) * size]);
                    });
        }

        // The draft's keys and values of all rows; its queries are not needed.
        void remember() {
            const Draft& draft = *e.m_.draft;
            const Layer& layer = e.m_.layer[e.m_.layers];
            int64_t rows = e.b_->rows, width = e.m_.features * e.m_.hidden;
            ready(rows, [&](int64_t row, Activations& to) {
                to.set(row, rows, &e.features_[row * width], width, e.m_.int8_activations);
            });
            products(draft.fc, rows, [&](int64_t row, int64_t column, F v) {
                store(&e.hidden_[row * e.hidden_stride_ + column], v);
            });
            ready(rows, [&](int64_t row, Activations& to) {
                e.beside(id, row, rows, e.b_->ids[row], e.state_before(row), to);
            });
            project(layer, rows, layer.heads * layer.head_dim / TILE);
            place(e.m_.layers, rows);
            if (id == 0) e.keep_states();
        }

        void propose(int64_t depth, int32_t* ids) {
            const Draft& draft = *e.m_.draft;
            int index = e.m_.layers;
            const Layer& layer = e.m_.layer[index];
            int64_t rows = e.b_->rows, stride = padded(draft.words, TILE);
            each(rows, 1, [&](int64_t row) {
                std::copy_n(e.state_before(row), e.hidden_stride_,
                            &e.hidden_[row * e.hidden_stride_]);
                e.turn_angles(row);
            });
            for (int64_t step = 0; step < depth; ++step) {
                ready(rows, [&](int64_t row, Activations& to) {
                    int32_t token = step ? ids[row * depth + step - 1] : e.b_->ids[row];
                    e.beside(id, row, rows, token, &e.hidden_[row * e.hidden_stride_], to);
                });
                project(layer, rows, 0);
                attend(index, rows, true);
                finish(layer, rows);
                ready(rows, [&](int64_t row, Activations& to) {
                    e.normalise(id, row, rows, draft.norm, layer.norm_eps, to);
                });
                products(draft.head, rows, [&](int64_t row, int64_t column, F v) {
                    store(&e.words_[row * stride + column], v);
                });
                each(rows, 1, [&](int64_t row) {
                    const float* first = &e.words_[row * stride];
                    auto word = std::max_element(first, first + draft.words) - first;
                    ids[row * depth + step] = draft.target_ids[word];
                    ++e.places_[row].slot;
                    e.turn_angles(row);
                });
            }
        }

        // After the last attention only rows whose logits are asked for go on.
        int64_t keep_wanted() {
            each(1, 1, [&](int64_t) {
                for (int64_t i = 0; i < e.b_->wanted; ++i) {
                    int64_t from = e.b_->wanted_rows[i];
                    std::copy_n(&e.hidden_[from * e.hidden_stride_], e.hidden_stride_,
                                &e.hidden_[i * e.hidden_stride_]);
                    std::copy_n(&e.wide_[from * e.wide_stride_], e.wide_stride_,
                                &e.wide_[i * e.wide_stride_]);
                }
            });
            return e.b_->wanted;
        }

        // silu(gate) * up, both tiles of a place one after the other.
        void gate_up(const Matrix& m, int64_t rows) {
            Tiles tiles(m);
            float* gate = e.scratch_[id].gate.data();
            int64_t pairs = tiles.count / 2;
            each(pairs, grain(pairs), [&](int64_t pair) {
                product(m, tiles, 2 * pair, acts(rows), rows, e.m_.int8_activations,
                        [&](int64_t row, int lane, F v) {
                            store(gate + row * TILE + lane, v / (1.0f + exponential(-v)));
                        });
                product(m, tiles, 2 * pair + 1, acts(rows), rows, e.m_.int8_activations,
                        [&](int64_t row, int lane, F v) {
                            store(&e.wide_[row * e.wide_stride_ + pair * TILE + lane],
                                  load(gate + row * TILE + lane) * v);
                        });
            });
        }
    };

    void turn_angles(int64_t row) {
        for (int i = 0; i < m_.rope_sizes; ++i) {
            int64_t half_size = m_.rope_dims[i] / 2;
            float* to = &angles_[i][row * m_.rope_dims[i]];
            for (int64_t d = 0; d < half_size; ++d) {
                float angle = static_cast<float>(places_[row].slot) * m_.frequencies[i][d];
                to[d] = std::cos(angle) * m_.rope_factors[i];
                to[half_size + d] = std::sin(angle) * m_.rope_factors[i];
            }
        }
    }

    // RMSNorm (Zhang and Sennrich 2019) of a hidden row, ready for a product.
    void normalise(int id, int64_t row, int64_t rows, const float* weight, float eps,
                   Activations& to) {
        const float* x = &hidden_[row * hidden_stride_];
        float* out = scratch_[id].row.data();
        norm(x, weight, out, eps);
        to.set(row, rows, out, m_.hidden, m_.int8_activations);
    }

    void norm(const float* x, const float* weight, float* out, float eps) const {
        F squares{};
        int64_t stride = hidden_stride_;
        for (int64_t i = 0; i < stride; i += W) squares = fma(load(x + i), load(x + i), squares);
        float scale = 1.0f / std::sqrt(sum(squares) / static_cast<float>(m_.hidden) + eps);
        for (int64_t i = 0; i < stride; i += W)
            store(out + i, load(x + i) * scale * load(weight + i));
    }

    // A token's embedding and what precedes it, both normed, ready for the draft's product.
    void beside(int id, int64_t row, int64_t rows, int32_t token, const float* hidden,
                Activations& to) {
        const Layer& layer = m_.layer[m_.layers];
        float *out = scratch_[id].row.data(), *embedded = scratch_[id].embedded.data();
        read_row(m_.draft->embedding, token, embedded);
        norm(embedded, layer.input_norm, out, layer.norm_eps);
        norm(hidden, m_.draft->hidden_norm, out + m_.hidden, layer.norm_eps);
        to.set(row, rows, out, 2 * m_.hidden, m_.int8_activations);
    }

    bool is_feature(int layer) const {
        return std::count(m_.feature_layers, m_.feature_layers + m_.features, layer) > 0;
    }

    // Whether later steps may go on from a row: its page has place for its last ones.
    bool is_kept(int64_t row) const {
        Place at = places_[row];
        int32_t count = b_->starts[at.span + 1] - b_->starts[at.span],
                last = b_->cached[at.span] + count - 1;
        return at.slot > std::min(at.slot | (PAGE - 1), last) - m_.kept_rows;
    }

    // A slot's row among those that its page keeps.
    int64_t kept_at(int group, int32_t span, int64_t slot) const {
        return int64_t(page(group, span, slot / PAGE)) * m_.kept_rows + slot % m_.kept_rows;
    }

    // The draft's input of the slot before a row's. Slot 0 has none, and is never seen.
    const float* state_before(int64_t row) const {
        Place at = places_[row];
        if (row > b_->starts[at.span] || !at.slot)
            return &hidden_[(at.slot ? row - 1 : row) * hidden_stride_];
        int group = m_.layer[m_.layers].page_group;
        return states_ + kept_at(group, at.span, at.slot - 1) * hidden_stride_;
    }

    void keep_states() {
        int group = m_.layer[m_.layers].page_group;
        for (int64_t row = 0; row < b_->rows; ++row)
            if (is_kept(row))
                std::copy_n(&hidden_[row * hidden_stride_], hidden_stride_,
                            states_ + kept_at(group, places_[row].span, places_[row].slot) *
                                          hidden_stride_);
    }

    void quantise(int64_t row, int64_t rows, int64_t width, Activations& to) {
        to.set(row, rows, &wide_[row * wide_stride_], width, m_.int8_activations);
    }

    // Norm, convolution and rotation of a key-value head and its queries; key and value go to their
    // page.
    void place(int id, int index, int64_t row, int64_t kv_head) {
        const Layer& layer = m_.layer[index];
        int64_t size = layer.head_dim, queries = layer.heads * size, keys = layer.kv_heads * size;
        float* q = &qkv_[row * qkv_stride_];
        const float *k = q + queries, *v = k + keys;
        const float *k_before = nullptr, *v_before = nullptr;
        Place at = places_[row];
        Pool& pool = pools_[index];
        if (layer.conv_k && at.slot) {
            if (row > b_->starts[at.span]) {
                k_before = k - qkv_stride_;
                v_before = v - qkv_stride_;
            } else {
                int64_t last = kept_at(layer.page_group, at.span, at.slot - 1);
                k_before = pool.raw_keys + last * keys;
                v_before = pool.raw_values + last * keys;
            }
        }
        float* head = scratch_[id].row.data();
        const float* angles = &angles_[layer.rope][row * size];
        int64_t per = layer.heads / layer.kv_heads;
        for (float* x = q + kv_head * per * size; x < q + (kv_head + 1) * per * size; x += size) {
            head_norm(x, layer.q_norm, head, size);
            rotate(head, angles, x, size);
        }
        int64_t page_at = page(layer.page_group, at.span, at.slot / PAGE);
        float turned[MOST_HEAD], mixed[MOST_HEAD];
        two_taps(k_before, k, layer.conv_k, kv_head, size, mixed);
        head_norm(mixed, layer.k_norm, head, size);
        rotate(head, angles, turned, size);
        two_taps(v_before, v, layer.conv_v, kv_head, size, mixed);
        write(pool, page_at * layer.kv_heads + kv_head, at.slot % PAGE, turned, mixed, size);
    }

    void head_norm(const float* x, const float* weight, float* out, int64_t size) const {
        if (!weight) {
            std::copy(x, x + size, out);
            return;
        }
        float squares = 0;
        for (int64_t i = 0; i < size; ++i) squares += x[i] * x[i];
        float scale = 1.0f / std::sqrt(squares / static_cast<float>(size) + m_.norm_eps);
        for (int64_t i = 0; i < size; ++i) out[i] = x[i] * scale * weight[i];
    }

    // Baichuan-M1: tap 0 weighs the token before, tap 1 this one (arXiv 2411.19574, eq. 5).
    static void two_taps(const float* before, const float* now, const float* taps, int64_t head,
                         int64_t size, float* out) {
        now += head * size;
        for (int64_t i = 0; i < size; ++i) {
            if (!taps)
                out[i] = now[i];
            else
                out[i] = (before ? taps[2 * head] * before[head * size + i] : 0.0f) +
                         taps[2 * head + 1] * now[i];
        }
    }

    static void rotate(const float* x, const float* angles, float* out, int64_t size) {
        int64_t middle = size / 2;
        const float *cosine = angles, *sine = angles + middle;
        for (int64_t i = 0; i < middle; ++i) {
            float first = x[i], second = x[middle + i];
            out[i] = first * cosine[i] - second * sine[i];
            out[middle + i] = second * cosine[i] + first * sine[i];
        }
    }

    void write(Pool& pool, int64_t block, int64_t offset, const float* key, const float* value,
               int64_t size) const {
        int64_t width = padded(size, TILE);
        if (!m_.int8_kv) {
            half* keys = static_cast<half*>(pool.keys) + block * size * PAGE + offset;
            half* values = static_cast<half*>(pool.values) + (block * PAGE + offset) * width;
            for (int64_t i = 0; i < size; i += W) {
                float part[2 * W] = {};
                half narrowed[2 * W];
                int64_t count = std::min<int64_t>(W, size - i);
                std::copy(key + i, key + i + count, part);
                std::copy(value + i, value + i + count, part + W);
                narrow(narrowed, load(part));
                narrow(narrowed + W, load(part + W));
                for (int64_t j = 0; j < count; ++j) keys[(i + j) * PAGE] = narrowed[j];
                std::copy(narrowed + W, narrowed + W + count, values + i);
            }
            return;
        }
        int8_t* keys = static_cast<int8_t*>(pool.keys) + block * size * PAGE + offset;
        int8_t* values = static_cast<int8_t*>(pool.values) + (block * PAGE + offset) * width;
        auto peak = [&](const float* x) {
            float most = 0, strange = 0;  // as in `Activations::set`
            for (int64_t i = 0; i < size; ++i) {
                most = std::max(most, std::fabs(x[i]));
                strange += x[i] * 0.0f;
            }
            return most + strange;
        };
        float key_peak = peak(key), value_peak = peak(value);
        auto inverse = [](float x) { return x > LEAST_PEAK && x < INFINITY ? 127.0f / x : 0.0f; };
        float key_inverse = inverse(key_peak), value_inverse = inverse(value_peak);
        auto byte = [](float x, float by) {
            return by > 0 ? static_cast<int8_t>(std::nearbyint(x * by)) : int8_t{0};
        };
        for (int64_t i = 0; i < size; ++i) {
            keys[i * PAGE] = byte(key[i], key_inverse);
            values[i] = byte(value[i], value_inverse);
        }
        pool.key_scales[block * PAGE + offset] = key_peak / 127.0f;
        pool.value_scales[block * PAGE + offset] = value_peak / 127.0f;
    }

    // M1: the raw K and V of the last rows of pages and spans, for whoever continues there.
    void keep_raw(int index) {
        const Layer& layer = m_.layer[index];
        int64_t queries = layer.heads * layer.head_dim, keys = layer.kv_heads * layer.head_dim;
        for (int64_t row = 0; row < b_->rows; ++row) {
            Place at = places_[row];
            if (!is_kept(row)) continue;
            int64_t to = kept_at(layer.page_group, at.span, at.slot) * keys;
            const float* k = &qkv_[row * qkv_stride_ + queries];
            std::copy(k, k + keys, pools_[index].raw_keys + to);
            std::copy(k + keys, k + 2 * keys, pools_[index].raw_values + to);
        }
    }

    // Attention of one key-value head's queries for some rows, page by page with a running softmax
    // (Milakov and Gimelshein 2018). A row takes its pages in the same order in any company.
    void attend(int id, int index, int64_t kv_head, int64_t from, bool is_placing) {
        const Layer& layer = m_.layer[index];
        Scratch& s = scratch_[id];
        int64_t size = layer.head_dim, width = padded(size, TILE),
                per = layer.heads / layer.kv_heads;
        int64_t count = std::min<int64_t>(BLOCK_ROWS, b_->rows - from);
        float temper = 1.0f / std::sqrt(static_cast<float>(size));
        int64_t firsts[BLOCK_ROWS], lasts[BLOCK_ROWS], lows[BLOCK_ROWS];
        int64_t begin = INT64_MAX, end = 0;
        for (int64_t i = 0; i < count; ++i) {
            int64_t row = order_[from + i], slot = places_[row].slot;
            if (is_placing) place(id, index, row, kv_head);
            lows[i] = std::max<int64_t>(layer.first, layer.window ? slot + 1 - layer.window : 0);
            firsts[i] = lows[i] / PAGE;
            lasts[i] = slot / PAGE;
            begin = std::min(begin, firsts[i]);
            end = std::max(end, lasts[i] + 1);
            const float* q = &qkv_[row * qkv_stride_ + kv_head * per * size];
            float* to = &s.queries[i * per * size];
            for (int64_t j = 0; j < per * size; ++j) to[j] = q[j] * temper;
            std::fill_n(&s.mixed[i * per * width], per * width, 0.0f);
            std::fill_n(&s.peaks[i * per], per, -1e30f);
            std::fill_n(&s.sums[i * per], per, 0.0f);
        }
        for (int64_t p = begin; p < end; ++p)
            for (int64_t i = 0, next; i < count; i = next) {
                next = i + 1;
                if (p < firsts[i] || p > lasts[i]) continue;
                int32_t shared = page(layer.page_group, places_[order_[from + i]].span, p);
                while (next < count && firsts[next] <= p && p <= lasts[next] &&
                       page(layer.page_group, places_[order_[from + next]].span, p) == shared)
                    ++next;
                int64_t block = int64_t(shared) * layer.kv_heads + kv_head,
                        queries = (next - i) * per;
                read_page(s, pools_[index], block, size, i * per, queries,
                          [&](int64_t query, int64_t& low, int64_t& high) {
                              int64_t r = query / per;
                              low = std::max<int64_t>(0, lows[r] - p * PAGE);
                              high = std::min<int64_t>(
                                  PAGE, places_[order_[from + r]].slot + 1 - p * PAGE);
                          });
            }
        for (int64_t i = 0; i < count; ++i)
            for (int64_t j = 0; j < per; ++j) {
                float scale = 1.0f / s.sums[i * per + j];
                const float* x = &s.mixed[(i * per + j) * width];
                float* to = &wide_[order_[from + i] * wide_stride_ + (kv_head * per + j) * size];
                for (int64_t d = 0; d < size; ++d) to[d] = x[d] * scale;
            }
    }

    template <class Visible>
    void read_page(Scratch& s, const Pool& pool, int64_t block, int64_t size, int64_t first,
                   int64_t queries, Visible&& visible) {
        int64_t width = padded(size, TILE), most = 0;
        float* scores = &s.scores[first * PAGE];
        const float* x = &s.queries[first * size];
        if (m_.int8_kv)
            mix_all(x, size, size, static_cast<const int8_t*>(pool.keys) + block * size * PAGE,
                    PAGE, PAGE, scores, PAGE, queries, false);
        else
            mix_all(x, size, size, static_cast<const half*>(pool.keys) + block * size * PAGE, PAGE,
                    PAGE, scores, PAGE, queries, false);
        float *peaks = &s.peaks[first], *sums = &s.sums[first], *fades = &s.fades[first];
        for (int64_t i = 0; i < queries; ++i) {
            float* row = scores + i * PAGE;
            int64_t low, high;
            visible(first + i, low, high);
            most = std::max(most, high);
            if (m_.int8_kv)
                for (int j = 0; j < PAGE; j += W)
                    store(row + j, load(row + j) * load(pool.key_scales + block * PAGE + j));
            std::fill(row, row + low, -INFINITY);
            std::fill(row + high, row + PAGE, -INFINITY);
            F top = splat(peaks[i]);
            for (int j = 0; j < PAGE; j += W) top = larger(top, load(row + j));
            float peak = largest(top);
            fades[i] = peaks[i] - peak;
            peaks[i] = peak;
        }
        for (int64_t i = 0; i < queries; i += W) store(fades + i, exponential(load(fades + i)));
        for (int64_t i = 0; i < queries; ++i) {
            float *row = scores + i * PAGE, *mixed = &s.mixed[(first + i) * width];
            F total{};
            for (int j = 0; j < PAGE; j += W) {
                F p = exponential(load(row + j) - peaks[i]);
                total += p;
                store(row + j, m_.int8_kv ? p * load(pool.value_scales + block * PAGE + j) : p);
            }
            sums[i] = sums[i] * fades[i] + sum(total);
            for (int64_t d = 0; d < width; d += W) store(mixed + d, load(mixed + d) * fades[i]);
        }
        float* mixed = &s.mixed[first * width];
        if (m_.int8_kv)
            mix_all(scores, PAGE, most,
                    static_cast<const int8_t*>(pool.values) + block * PAGE * width, width, width,
                    mixed, width, queries, true);
        else
            mix_all(scores, PAGE, most,
                    static_cast<const half*>(pool.values) + block * PAGE * width, width, width,
                    mixed, width, queries, true);
    }

    Model m_;
    Crew crew_;
    std::vector<std::atomic<int64_t>>
        counters_;  // one of every 16 is used: none shares a cache line
    std::vector<Pool> pools_;
    std::vector<std::unique_ptr<void, decltype(&std::free)>> blocks_;
    std::vector<Scratch> scratch_;
    int64_t hidden_stride_, capacity_ = 0, qkv_stride_ = 0, wide_stride_ = 0;
    int64_t widest_qkv_ = 0, widest_ = 0, largest_head_ = 0, most_groups_ = 0;
    std::vector<float> hidden_, qkv_, wide_, features_, words_;
    float* states_ = nullptr;  // the draft's: [pages][kept][hidden], `fc` of the features
    std::vector<std::vector<float>> angles_;  // by head size [rows][cosines, sines]
    std::vector<Place> places_;
    std::vector<int32_t> order_, span_order_;
    Activations acts_;
    const Batch* b_ = nullptr;
    bool is_single_ = false;  // a row for each span
    float* logits_ = nullptr;
};

}  // namespace

// ---------------------------------------------------------------- the plain C interface

extern "C" {

// 2: AVX512 with VNNI; 1: AVX2 with FMA and F16C; 0: neither. Asked of the portable build. By
// cpuid: compilers' own functions differ, and one answers 0 in a library that it links itself.
int attending_best_path() {
#if defined(__x86_64__)
    unsigned a, b, c, d, saved, unused;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
    bool has_more = c >> 12 & c >> 27 & c >> 28 & c >> 29 & 1;  // FMA, OSXSAVE, AVX, F16C
    if (!has_more || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    __asm__("xgetbv" : "=a"(saved), "=d"(unused) : "c"(0));  // what the system keeps for a thread
    if ((saved & 0x06) != 0x06 || !(b >> 5 & 1)) return 0;
    bool has_all = b >> 16 & b >> 17 & b >> 30 & b >> 31 & c >> 11 & 1;  // F, DQ, BW, VL, VNNI
    return has_all && (saved & 0xe6) == 0xe6 ? 2 : 1;
#else
    return 0;
#endif
}

// Operations per second, in thousands of millions, of `threads` threads that do nothing else:
// 0: products of 4 by 8 bits with their sums; 1: float32.
double attending_ceiling(int kind, int threads) try {
    Crew crew(threads);
    std::vector<double> speeds(threads);
    for (int round = 0; round < 2; ++round)  // the first wakes the processor up
        crew.run([&](int id) {
            constexpr int64_t steps = 10'000'000;
            I integers[12] = {}, bytes = splat(0x01010101);
            F floats[12] = {}, one = splat(1.0f);
            const int8_t four[4] = {1, 2, 3, 4};
            for (int i = 0; i < 12; ++i) integers[i] += i, floats[i] += static_cast<float>(i);
            auto start = std::chrono::steady_clock::now();
            for (int64_t i = 0; i < steps; ++i) {
                if (kind == 0)
                    for (auto& x : integers) {
                        x = dot4<4>(x, bytes, four);
                        if (i % 8 == 7) x = group_sum<4, true>(x, 0);
                    }
                else
                    for (auto& x : floats) x = fma(one, one, x);
                __asm__ volatile("" : "+" VECTOR(bytes), "+" VECTOR(one));
            }
            std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
            for (int i = 1; i < 12; ++i) integers[0] += integers[i], floats[0] += floats[i];
            __asm__ volatile("" : : VECTOR(integers[0]), VECTOR(floats[0]));
            speeds[id] = 12.0 * W * (kind == 0 ? 8 : 2) * steps / seconds.count() / 1e9;
        });
    return std::accumulate(speeds.begin(), speeds.end(), 0.0);
} catch (...) {
    return 0;
}

// Null if there is not enough memory, or no room for its threads.
void* attending_open(const Model* model) try { return new Engine(*model); } catch (...) {
    return nullptr;
}

void attending_close(void* engine) { delete static_cast<Engine*>(engine); }

// logits [wanted][vocab], features [rows][features][hidden] or null. 0, or 1 if there is not enough
// memory: then nothing was written.
int attending_step(void* engine, const Batch* batch, float* logits, float* features) try {
    static_cast<Engine*>(engine)->step(*batch, logits, features);
    return 0;
} catch (...) {
    return 1;
}

// ids [rows][depth] from a row of each span; 0, or 1 as above.
int attending_propose(void* engine, const Batch* batch, int32_t depth, int32_t* ids) try {
    static_cast<Engine*>(engine)->propose(*batch, depth, ids);
    return 0;
} catch (...) {
    return 1;
}

// out [rows][outputs padded to 16] = x [rows][inputs] times the matrix, as a step does it.
void attending_product(const Matrix* matrix, const float* x, int32_t rows, int32_t int8,
                       float* out) {
    Activations acts;
    acts.reserve(rows, matrix->inputs, int8);
    std::vector<float> row(padded(matrix->inputs, PAD));
    for (int64_t i = 0; i < rows; ++i) {
        std::copy(x + i * matrix->inputs, x + (i + 1) * matrix->inputs, row.begin());
        acts.set(i, rows, row.data(), matrix->inputs, int8);
    }
    Tiles tiles(*matrix);
    for (int64_t tile = 0; tile < tiles.count; ++tile)
        product(*matrix, tiles, tile, acts, rows, int8, [&](int64_t i, int lane, F v) {
            store(out + i * tiles.count * TILE + tile * TILE + lane, v);
        });
}

// to [inputs]: the weights of one output.
void attending_read_row(const Matrix* matrix, int32_t output, float* to) {
    read_row(*matrix, output, to);
}
}
