#include "contraction.hpp"

#include <algorithm>
#include <cstring>

#include "kernel.hpp"
#include "sweep.hpp"
#include "team.hpp"

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
constexpr int kPart = 16;     // runs of a head that are one task
constexpr int kPanels = 128;  // columns
constexpr int kLine = 16;     // floats that memory delivers at once
constexpr int kTasks = 2;     // of a product, a thread

std::int64_t divided_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Some tokens of one sample, and which run of the chunk they are.
struct Run {
    std::int64_t sample, token, n_tokens, index;
};

using Chunk = std::vector<Run>;

// Where a row's runs lie: in scratch, or in the operand itself where that needs no change.
struct Row {
    const float* data;
    std::int64_t sample, token, run;  // strides

    const float* at(const Run& of) const { return data + of.sample * sample + of.token * token + of.index * run; }
};

// Scratch of some rows, [runs, rows, kTokens, padded(width)], all rows of a run together as they are read together.
// What they are apart is no multiple of a page, or all would compete for the same few lines of a cache.
struct RowScratch {
    float* data;
    std::int64_t row, run;  // strides

    RowScratch(float* data, std::int64_t n_rows, std::int64_t width)
        : data(data), row(pitch(width)), run(n_rows * row) {}
    float* at(std::int64_t row_index, std::int64_t run_index) const { return data + row_index * row + run_index * run; }
};

// The index of a row's first element, of the run's token i.
std::int64_t index_of(const Operand& x, const Run& run, std::int64_t i, std::int64_t row) {
    return run.sample * x.sample + (run.token + i) * x.token + row * x.row;
}

EAPTK_CLONES
void widen(const std::uint16_t* x, std::int64_t n, float* out) {
    for (std::int64_t i = 0; i < n; ++i) {
        const std::uint32_t bits = std::uint32_t(x[i]) << 16;
        std::memcpy(out + i, &bits, sizeof bits);
    }
}

void read(const Operand& x, std::int64_t start, std::int64_t n, float* out) {
    if (x.bfloat16) {
        widen(static_cast<const std::uint16_t*>(x.data) + start, n, out);
    } else {
        std::memcpy(out, static_cast<const float*>(x.data) + start, n * sizeof(float));
    }
}

EAPTK_CLONES
void subtract_from(const float* other, std::int64_t n, float* x) {
    for (std::int64_t i = 0; i < n; ++i) x[i] = other[i] - x[i];
}

EAPTK_CLONES
void scale(float by, std::int64_t n, float* x) {
    for (std::int64_t i = 0; i < n; ++i) x[i] *= by;
}

EAPTK_CLONES
void normalise(float mean, float rho, std::int64_t n, float* x) {
    for (std::int64_t i = 0; i < n; ++i) x[i] = (x[i] - mean) * rho;
}

// Whether it can be multiplied where it lies: a run's tokens one after the other, with nothing between them.
bool is_direct(const Operand& x, std::int64_t width) {
    return !x.bfloat16 && width % kPadding == 0 && x.token == width;
}

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

// RowScratch of weight [head_dim, n_columns] into panels of [head_dim, columns], zero past the last column.
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

// Sources [first, last) with all destinations, over all runs of a chunk.
struct Product {
    const std::vector<Row>& destinations;
    const std::vector<Row>& sources;
    const std::vector<std::int64_t>& reaches;  // of destinations, in ascending order
    const Chunk& runs;
    std::int64_t stride;  // between tokens of a row
    double* out;          // of the first sample, [destinations, stride_out]
    std::int64_t stride_out, stride_sample, first_sample;
};

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

struct Steps {
    void (*expand)(const float*, std::int64_t, const Weight&, const float*, std::int64_t, float*, float*, std::int64_t);
    void (*through_norm)(const float*, const float*, bool, std::int64_t, std::int64_t, float*);
    void (*multiply)(const Product&, std::int64_t, std::int64_t);
    int tile_sources;
};

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

// All that one thread needs for itself.
struct Member {
    std::vector<float> narrow, panels, other;
};

// Some runs of a chunk.
struct Part {
    const Run *first, *last;

    const Run* begin() const { return first; }
    const Run* end() const { return last; }
    std::int64_t size() const { return last - first; }
};

class Contraction {
   public:
    Contraction(const std::vector<Source>& sources, const std::vector<Group>& groups, std::int64_t width,
                const Scratch& scratch, int threads, int lanes)
        : width_(width), stride_(padded(width)), scratch_(scratch), threads_(threads),
          steps_(lanes == 16 ? avx512 : avx2), team_(threads) {
        std::int64_t most = 1, n_rows = 0;
        for (const Source& source : sources) n_rows += source.rows;
        sources_ = RowScratch(scratch.sources, n_rows, width);
        for (const Source& source : sources) {
            for (std::int64_t row = 0; row < source.rows; ++row) {
                const bool direct = !source.weight.data && !source.replacement.data && is_direct(source.value, width);
                if (!direct) written_.push_back({&source, row, std::int64_t(rows_.size())});
                rows_.push_back(row_of(direct, source.value, sources_, rows_.size()));
            }
            if (source.weight.data) most = std::max(most, source.weight.head_dim);
        }
        for (const Group& group : groups) {
            for (const Reader& reader : group) {
                for (const Gradient& gradient : reader.gradients) most = std::max(most, gradient.weight.head_dim);
            }
            groups_.push_back(prepared(group));
            groups_.back().offset = size_;
            size_ += std::int64_t(groups_.back().rows.size()) * groups_.back().reach;
        }
        for (int i = 0; i < threads; ++i) {
            members_.push_back({std::vector<float>(kPart * kTokens * most), std::vector<float>(kPanels * most),
                                std::vector<float>(std::max(most, width))});
        }
    }

    void run(std::int64_t first, const std::vector<std::int64_t>& lengths, double* out) {
        const std::vector<Chunk> chunks = divide(first, lengths);
        team_.run([&](int member) {
            for (const Chunk& chunk : chunks) work(chunk, members_[member], first, out);
        });
    }

   private:
    struct WrittenSource {
        const Source* source;
        std::int64_t row, place;
    };
    struct WrittenGradient {
        const Reader* reader;
        const Gradient* gradient;
        std::int64_t reader_index, row, place;
    };
    struct Prepared {
        const Group& readers;
        RowScratch gradients, normed;
        std::vector<WrittenGradient> written;
        std::vector<Row> rows;
        std::vector<std::int64_t> reaches;
        std::int64_t reach, offset;
    };

    static Row row_of(bool direct, const Operand& x, const RowScratch& scratch, std::int64_t place) {
        if (direct) return {static_cast<const float*>(x.data), x.sample, x.token, 0};
        return {scratch.at(place, 0), 0, 0, scratch.run};
    }

    Prepared prepared(const Group& group) const {
        std::int64_t n_rows = 0;
        for (const Reader& reader : group) {
            for (const Gradient& gradient : reader.gradients) n_rows += gradient.rows;
        }
        Prepared out{group, {scratch_.gradients, n_rows, width_}, {scratch_.normed, std::int64_t(group.size()), width_},
                     {},    {},                                   {},
                     0,     0};
        for (const Reader& reader : group) {
            for (const Gradient& gradient : reader.gradients) {
                for (std::int64_t row = 0; row < gradient.rows; ++row) {
                    const bool direct = !reader.stream.data && is_direct(gradient.value, width_);
                    const std::int64_t index = out.rows.size();
                    if (!direct) out.written.push_back({&reader, &gradient, &reader - group.data(), row, index});
                    out.rows.push_back(row_of(direct, gradient.value, out.gradients, index));
                    out.reaches.push_back(gradient.reach);
                }
            }
        }
        out.reach = out.reaches.back();
        return out;
    }

    // Runs of samples one after the other into as few chunks as hold them. Where a run begins and ends depends on its
    // sample alone.
    std::vector<Chunk> divide(std::int64_t first, const std::vector<std::int64_t>& lengths) const {
        std::vector<Chunk> chunks(1);
        for (std::size_t i = 0; i < lengths.size(); ++i) {
            for (std::int64_t token = 0; token < lengths[i]; token += kTokens) {
                if (std::int64_t(chunks.back().size()) == scratch_.runs) chunks.emplace_back();
                const std::int64_t n = std::min<std::int64_t>(kTokens, lengths[i] - token);
                chunks.back().push_back({first + std::int64_t(i), token, n, std::int64_t(chunks.back().size())});
            }
        }
        return chunks;
    }

    void work(const Chunk& chunk, Member& member, std::int64_t first, double* out) {
        const std::int64_t parts = divided_up(chunk.size(), kPart);
        const auto part = [&](std::int64_t task) {
            const Run* const start = chunk.data() + task % parts * kPart;
            return Part{start, std::min(start + kPart, chunk.data() + chunk.size())};
        };
        team_.phase(written_.size() * parts,
                    [&](std::int64_t task) { write_source(written_[task / parts], part(task), member); });
        for (const Prepared& group : groups_) {
            team_.phase(group.readers.size() * parts, [&](std::int64_t task) {
                write_normed(group.readers[task / parts], group.normed, task / parts, part(task));
            });
            team_.phase(group.written.size() * parts, [&](std::int64_t task) {
                write_gradient(group, group.written[task / parts], part(task), member);
            });
            const Product product{group.rows,  rows_, group.reaches, chunk, stride_, out + group.offset,
                                  group.reach, size_, first};
            // Few tasks, as each reads all destinations.
            const std::int64_t tiles = divided_up(divided_up(group.reach, kTasks * threads_), steps_.tile_sources);
            const std::int64_t step = tiles * steps_.tile_sources;
            team_.phase(divided_up(group.reach, step), [&](std::int64_t task) {
                steps_.multiply(product, task * step, std::min(group.reach, (task + 1) * step));
            });
        }
    }

    void write_source(const WrittenSource& of, const Part& part, Member& member) const {
        const Source& source = *of.source;
        const std::int64_t n = source.weight.data ? source.weight.head_dim : width_;
        float* narrow = member.narrow.data();
        for (const Run& run : part) {
            float* row = source.weight.data ? narrow : sources_.at(of.place, run.index);
            for (std::int64_t i = 0; i < run.n_tokens; ++i, row += source.weight.data ? n : stride_) {
                read(source.value, index_of(source.value, run, i, of.row), n, row);
                if (source.replacement.data) {
                    read(source.replacement, index_of(source.replacement, run, i, of.row), n, member.other.data());
                    subtract_from(member.other.data(), n, row);
                }
                if (!source.weight.data) std::fill(row + n, row + stride_, 0.0f);
            }
            if (source.weight.data) narrow += kTokens * n;
        }
        if (source.weight.data) {
            const float* const weight = source.weight.data + of.row * source.weight.row;
            steps_.expand(member.narrow.data(), part.size(), source.weight, weight, width_, member.panels.data(),
                          sources_.at(of.place, part.first->index), sources_.run);
        }
    }

    // x̂ of some runs.
    void write_normed(const Reader& reader, const RowScratch& normed, std::int64_t place, const Part& part) const {
        if (!reader.stream.data) return;
        for (const Run& run : part) {
            float* row = normed.at(place, run.index);
            for (std::int64_t i = 0; i < run.n_tokens; ++i, row += stride_) {
                read(reader.stream, index_of(reader.stream, run, i, 0), width_, row);
                const std::int64_t token = run.sample * reader.n_tokens + run.token + i;
                normalise(reader.mean ? reader.mean[token] : 0, reader.rho[token], width_, row);
                std::fill(row + width_, row + stride_, 0.0f);
            }
        }
    }

    void write_gradient(const Prepared& group, const WrittenGradient& of, const Part& part, Member& member) const {
        const Reader& reader = *of.reader;
        const Operand& value = of.gradient->value;
        const Weight& weight = of.gradient->weight;
        const std::int64_t n = weight.data ? weight.head_dim : width_;
        float* narrow = member.narrow.data();
        for (const Run& run : part) {
            float* row = weight.data ? narrow : group.gradients.at(of.place, run.index);
            for (std::int64_t i = 0; i < run.n_tokens; ++i, row += weight.data ? n : stride_) {
                read(value, index_of(value, run, i, of.row), n, row);
                if (reader.stream.data) scale(reader.rho[run.sample * reader.n_tokens + run.token + i], n, row);
                if (!weight.data) std::fill(row + n, row + stride_, 0.0f);
            }
            if (weight.data) narrow += kTokens * n;
        }
        if (weight.data) {
            steps_.expand(member.narrow.data(), part.size(), weight, weight.data + of.row * weight.row, width_,
                          member.panels.data(), group.gradients.at(of.place, part.first->index), group.gradients.run);
        }
        if (!reader.stream.data) return;
        for (const Run& run : part) {
            steps_.through_norm(group.normed.at(of.reader_index, run.index), reader.gain, reader.mean, run.n_tokens,
                                width_, group.gradients.at(of.place, run.index));
        }
    }

    const std::int64_t width_, stride_;
    const Scratch scratch_;
    const int threads_;
    const Steps& steps_;
    Team team_;
    RowScratch sources_{nullptr, 0, 0};
    std::vector<Row> rows_;
    std::vector<WrittenSource> written_;
    std::vector<Prepared> groups_;
    std::int64_t size_ = 0;
    std::vector<Member> members_;
};

}  // namespace

void contract(const std::vector<Source>& sources, const std::vector<Group>& groups, std::int64_t first,
              const std::vector<std::int64_t>& lengths, std::int64_t width, const Scratch& scratch, int threads, int lanes,
              double* out) {
    Contraction(sources, groups, width, scratch, threads, lanes).run(first, lengths, out);
}

std::vector<int> lanes() {
    if (has_avx512()) return {16, 8};
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {8};
    return {};
}

#else

void contract(const std::vector<Source>&, const std::vector<Group>&, std::int64_t, const std::vector<std::int64_t>&,
              std::int64_t, const Scratch&, int, int, double*) {}

std::vector<int> lanes() { return {}; }

#endif

}  // namespace eaptk
