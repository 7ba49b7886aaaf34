#include "steps.hpp"

#include <algorithm>
#include <cstring>

#include "kernel.hpp"
#include "sweep.hpp"

namespace eaptk {

#if EAPTK_AVX512

namespace {

// What is written once for vectors of any width is inlined into functions compiled for one. GCC makes one operation,
// rounded once, of a product and an addition; tests compare tiles of all sizes to the bit.
#define EAPTK_INLINE inline __attribute__((always_inline))

// An alias of a template would lose the attributes.
template <int lanes>
struct Lanes;
template <>
struct Lanes<16> {
    typedef float type __attribute__((vector_size(64), aligned(4), may_alias));
};
template <>
struct Lanes<8> {
    typedef float type __attribute__((vector_size(32), aligned(4), may_alias));
};
template <>
struct Lanes<4> {
    typedef float type __attribute__((vector_size(16), aligned(4), may_alias));
};
template <int lanes>
using Vector = typename Lanes<lanes>::type;

template <int lanes>
EAPTK_INLINE Vector<lanes>& at(float* x) {
    return *reinterpret_cast<Vector<lanes>*>(x);
}

template <int lanes>
EAPTK_INLINE const Vector<lanes>& at(const float* x) {
    return *reinterpret_cast<const Vector<lanes>*>(x);
}

template <int lanes>
EAPTK_INLINE float sum(const Vector<lanes>& x) {
    if constexpr (lanes == 4) {
        return (x[0] + x[2]) + (x[1] + x[3]);
    } else {
        Vector<lanes / 2> halves[2];
        std::memcpy(halves, &x, sizeof x);
        return sum<lanes / 2>(halves[0] + halves[1]);
    }
}

// Registers' worth: products of m destinations and n sources are held while their rows go by; and of a run's tokens and
// c vectors of columns while a head's dimensions do.
template <int lanes>
struct Tile;
template <>
struct Tile<16> {
    static constexpr int m = 5, n = 5, c = 4;
};
template <>
struct Tile<8> {
    static constexpr int m = 3, n = 3, c = 2;
};

// Floats of a row that are added up in float32, about: two tiles' worth stay near the core.
constexpr int kPiece = 1536;
constexpr int kLine = 16;  // floats that memory delivers at once

// narrow [kTokens, head_dim] · panel [head_dim, c vectors] into out [kTokens, *]; of a row `n_vectors` are stored.
template <int lanes, int c>
EAPTK_INLINE void expand_tile(const float* narrow, std::int64_t head_dim, const float* panel, float* out,
                              std::int64_t stride, int n_vectors) {
    Vector<lanes> sums[kTokens][c] = {};
    for (std::int64_t k = 0; k < head_dim; ++k) {
        Vector<lanes> weight[c];
#pragma GCC unroll 8
        for (int j = 0; j < c; ++j) weight[j] = at<lanes>(panel + (k * c + j) * lanes);
#pragma GCC unroll 8
        for (int i = 0; i < kTokens; ++i) {
#pragma GCC unroll 8
            for (int j = 0; j < c; ++j) sums[i][j] += narrow[i * head_dim + k] * weight[j];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kTokens; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < c; ++j) {
            if (j < n_vectors) at<lanes>(out + i * stride + j * lanes) = sums[i][j];
        }
    }
}

// Rows of weight [head_dim, n_columns] into panels of [head_dim, columns], zero past the last column.
template <int columns>
EAPTK_INLINE void bring_together(const Weight& weight, const float* data, std::int64_t n_columns, float* panels) {
    constexpr int few = 4;
    const std::int64_t head_dim = weight.head_dim, fours = head_dim % few == 0 ? n_columns / few * few : 0;
    for (std::int64_t first = 0; first < n_columns; first += columns, panels += head_dim * columns) {
        const std::int64_t real = std::min<std::int64_t>(columns, n_columns - first);
        const float* const here = data + first * weight.column;
        std::int64_t j = 0;
        if (weight.column == 1) {
            for (std::int64_t k = 0; k < head_dim; ++k) {
                std::memcpy(panels + k * columns, here + k * weight.dimension, real * sizeof(float));
            }
            j = real;
        }
        for (; first + j + few <= fours && j + few <= real; j += few) {
            for (std::int64_t k = 0; k < head_dim; k += few) {
                typedef int Order __attribute__((vector_size(16)));
                Vector<few> in[few];
                for (int i = 0; i < few; ++i) in[i] = at<few>(here + (j + i) * weight.column + k);
                const Vector<few> a = __builtin_shuffle(in[0], in[1], Order{0, 4, 1, 5});
                const Vector<few> b = __builtin_shuffle(in[0], in[1], Order{2, 6, 3, 7});
                const Vector<few> c = __builtin_shuffle(in[2], in[3], Order{0, 4, 1, 5});
                const Vector<few> d = __builtin_shuffle(in[2], in[3], Order{2, 6, 3, 7});
                at<few>(panels + (k + 0) * columns + j) = __builtin_shuffle(a, c, Order{0, 1, 4, 5});
                at<few>(panels + (k + 1) * columns + j) = __builtin_shuffle(a, c, Order{2, 3, 6, 7});
                at<few>(panels + (k + 2) * columns + j) = __builtin_shuffle(b, d, Order{0, 1, 4, 5});
                at<few>(panels + (k + 3) * columns + j) = __builtin_shuffle(b, d, Order{2, 3, 6, 7});
            }
        }
        for (; j < columns; ++j) {
            for (std::int64_t k = 0; k < head_dim; ++k) {
                panels[k * columns + j] = j < real ? here[j * weight.column + k * weight.dimension] : 0;
            }
        }
    }
}

// What a processor cannot foresee: some line of the next columns' weights.
EAPTK_INLINE void fetch(const Weight& weight, const float* data, std::int64_t n_columns, std::int64_t line) {
    const bool by_row = weight.column == 1;
    const std::int64_t lines = divided_up(by_row ? n_columns : weight.head_dim, kLine);
    __builtin_prefetch(data + line / lines * (by_row ? weight.dimension : weight.column) + line % lines * kLine);
}

// narrow [n, kTokens, head_dim] · a row of weight, `data`, into out, [kTokens, padded(width)] each `run` floats. A head's
// weights are brought together `kPanels` columns at a time, as they lie pages apart.
template <int lanes>
EAPTK_INLINE void expand(const float* narrow, std::int64_t n, const Weight& weight, const float* data,
                         std::int64_t width, float* panels, float* out, std::int64_t run) {
    constexpr int c = Tile<lanes>::c, columns = c * lanes;
    static_assert(kPanels % columns == 0);
    const std::int64_t stride = padded(width), head_dim = weight.head_dim;
    for (std::int64_t first = 0; first < stride; first += kPanels) {
        const std::int64_t n_columns = std::min<std::int64_t>(kPanels, stride - first);
        bring_together<columns>(weight, data + first * weight.column, std::min(n_columns, width - first), panels);
        const std::int64_t n_next = std::clamp<std::int64_t>(width - first - kPanels, 0, kPanels);
        const std::int64_t lines = n_next * head_dim / kLine, share = divided_up(lines * columns, n_columns * n);
        std::int64_t line = 0;
        for (std::int64_t j = 0; j < n_columns; j += columns) {
            const int n_vectors = int(std::min<std::int64_t>(c, (n_columns - j) / lanes));
            for (std::int64_t i = 0; i < n; ++i) {
                for (const std::int64_t end = std::min(lines, line + share); line < end; ++line) {
                    fetch(weight, data + (first + kPanels) * weight.column, n_next, line);
                }
                expand_tile<lanes, c>(narrow + i * kTokens * head_dim, head_dim, panels + j * head_dim,
                                      out + i * run + first + j, stride, n_vectors);
            }
        }
    }
}

// Gradients of n tokens of a run, ρ times those at a norm's output, become those at the stream that it reads, in place.
template <int lanes>
EAPTK_INLINE void through_norm(const float* normed, const float* gain, bool centred, std::int64_t n, std::int64_t width,
                               float* out) {
    const std::int64_t stride = padded(width);
    constexpr int few = 2;  // sums, as an addition waits for the one before
    for (std::int64_t i = 0; i < n; ++i, normed += stride, out += stride) {
        Vector<lanes> products[few] = {}, sums[few] = {};
        const auto add = [&](int j, std::int64_t k) __attribute__((always_inline)) {
            const Vector<lanes> value = at<lanes>(out + k) * at<lanes>(gain + k);
            at<lanes>(out + k) = value;
            products[j] += value * at<lanes>(normed + k);
            sums[j] += value;
        };
        std::int64_t k = 0;
        for (; k + few * lanes <= stride; k += few * lanes) {
            for (int j = 0; j < few; ++j) add(j, k + j * lanes);
        }
        for (; k < stride; k += lanes) add(0, k);
        const float along = sum<lanes>(products[0] + products[1]) / float(width);
        const float mean = centred ? sum<lanes>(sums[0] + sums[1]) / float(width) : 0;
        for (k = 0; k < stride; k += lanes) at<lanes>(out + k) -= along * at<lanes>(normed + k) + mean;
    }
}

template <int lanes, int m, int n>
EAPTK_INLINE void multiply_tile(const float* const* left, const float* const* right, std::int64_t first,
                                std::int64_t last, double* out, std::int64_t stride) {
    Vector<lanes> sums[m][n] = {};
    for (std::int64_t k = first; k < last; k += lanes) {
        Vector<lanes> source[n];
#pragma GCC unroll 8
        for (int j = 0; j < n; ++j) source[j] = at<lanes>(right[j] + k);
#pragma GCC unroll 8
        for (int i = 0; i < m; ++i) {
            const Vector<lanes> destination = at<lanes>(left[i] + k);
#pragma GCC unroll 8
            for (int j = 0; j < n; ++j) sums[i][j] += destination * source[j];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < m; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < n; ++j) out[i * stride + j] += double(sum<lanes>(sums[i][j]));
    }
}

template <int lanes, int m, int n>
EAPTK_INLINE void multiply_fewer(int n_sources, const float* const* left, const float* const* right,
                                 std::int64_t first, std::int64_t last, double* out, std::int64_t stride) {
    if constexpr (n > 0) {
        if (n_sources == n) return multiply_tile<lanes, m, n>(left, right, first, last, out, stride);
        multiply_fewer<lanes, m, n - 1>(n_sources, left, right, first, last, out, stride);
    }
}

template <int lanes, int m>
EAPTK_INLINE void multiply_any(int n_destinations, int n_sources, const float* const* left, const float* const* right,
                               std::int64_t first, std::int64_t last, double* out, std::int64_t stride) {
    if constexpr (m > 0) {
        if (n_destinations == m) {
            return multiply_fewer<lanes, m, Tile<lanes>::n>(n_sources, left, right, first, last, out, stride);
        }
        multiply_any<lanes, m - 1>(n_destinations, n_sources, left, right, first, last, out, stride);
    }
}

template <int lanes>
EAPTK_INLINE void multiply(const Product& of, std::int64_t first, std::int64_t last) {
    constexpr int m = Tile<lanes>::m, n = Tile<lanes>::n;
    const std::int64_t n_rows = of.destinations.size();
    const std::int64_t whole = kTokens * of.stride;
    const std::int64_t piece = divided_up(divided_up(whole, divided_up(whole, kPiece)), kPadding) * kPadding;
    for (const Run& run : of.runs) {
        const std::int64_t end = run.n_tokens * of.stride;
        double* const out = of.out + (run.sample - of.first_sample) * of.stride_sample;
        for (std::int64_t start = 0; start < end; start += piece) {
            const std::int64_t stop = std::min(end, start + piece);
            for (std::int64_t s = first; s < last; s += n) {
                const int n_sources = int(std::min<std::int64_t>(n, last - s));
                const float* right[n];
                for (int j = 0; j < n_sources; ++j) right[j] = of.sources[s + j].at(run);
                for (std::int64_t d = 0; d < n_rows; d += m) {
                    const int n_destinations = int(std::min<std::int64_t>(m, n_rows - d));
                    if (of.reaches[d + n_destinations - 1] <= s) continue;  // none of these is an edge
                    const float* left[m];
                    for (int i = 0; i < n_destinations; ++i) left[i] = of.destinations[d + i].at(run);
                    multiply_any<lanes, m>(n_destinations, n_sources, left, right, start, stop,
                                           out + d * of.stride_out + s, of.stride_out);
                }
            }
        }
    }
}

#define EAPTK_STEPS(name, lanes, features)                                                                         \
    __attribute__((target(features))) void expand_##name(                                                          \
        const float* narrow, std::int64_t n, const Weight& weight, const float* data, std::int64_t width,          \
        float* panels, float* out, std::int64_t run) {                                                             \
        expand<lanes>(narrow, n, weight, data, width, panels, out, run);                                           \
    }                                                                                                              \
    __attribute__((target(features))) void through_norm_##name(const float* normed, const float* gain, bool centred, \
                                                               std::int64_t n, std::int64_t width, float* out) {   \
        through_norm<lanes>(normed, gain, centred, n, width, out);                                                 \
    }                                                                                                              \
    __attribute__((target(features))) void multiply_##name(const Product& of, std::int64_t first, std::int64_t last) { \
        multiply<lanes>(of, first, last);                                                                          \
    }                                                                                                              \
    constexpr Steps name{expand_##name, through_norm_##name, multiply_##name, Tile<lanes>::n};

EAPTK_STEPS(avx512, 16, "avx2,fma,avx512f,avx512dq,avx512bw,avx512vl")
EAPTK_STEPS(avx2, 8, "avx2,fma")

}  // namespace

const Steps& steps_of(int lanes) { return lanes == 16 ? avx512 : avx2; }

std::vector<int> lanes() {
    if (has_avx512()) return {16, 8};
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {8};
    return {};
}

#else

const Steps& steps_of(int) {
    static constexpr Steps none{};
    return none;
}

std::vector<int> lanes() { return {}; }

#endif

}  // namespace eaptk
