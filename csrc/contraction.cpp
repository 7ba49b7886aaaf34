#include "contraction.hpp"

#include <algorithm>
#include <cstring>

#include "kernel.hpp"
#include "steps.hpp"
#include "team.hpp"

namespace eaptk {
namespace {

constexpr int kPart = 16;  // runs of a head that are one task
constexpr int kTasks = 2;  // of a product, a thread

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
          steps_(steps_of(lanes)), team_(threads) {
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

    // A row of some runs into scratch, expanded where there is a weight; change(row, n, run, i) comes before that.
    template <class Change>
    void write(const Operand& value, const Weight& weight, std::int64_t row_index, const RowScratch& scratch,
               std::int64_t place, const Part& part, Member& member, const Change& change) const {
        const std::int64_t n = weight.data ? weight.head_dim : width_, stride = weight.data ? n : stride_;
        float* narrow = member.narrow.data();
        for (const Run& run : part) {
            float* row = weight.data ? narrow : scratch.at(place, run.index);
            for (std::int64_t i = 0; i < run.n_tokens; ++i, row += stride) {
                read(value, index_of(value, run, i, row_index), n, row);
                change(row, n, run, i);
                std::fill(row + n, row + stride, 0.0f);
            }
            if (weight.data) narrow += kTokens * n;
        }
        if (!weight.data) return;
        steps_.expand(member.narrow.data(), part.size(), weight, weight.data + row_index * weight.row, width_,
                      member.panels.data(), scratch.at(place, part.first->index), scratch.run);
    }

    void write_source(const WrittenSource& of, const Part& part, Member& member) const {
        const Operand& replacement = of.source->replacement;
        const auto change = [&](float* row, std::int64_t n, const Run& run, std::int64_t i) {
            if (!replacement.data) return;
            read(replacement, index_of(replacement, run, i, of.row), n, member.other.data());
            subtract_from(member.other.data(), n, row);
        };
        write(of.source->value, of.source->weight, of.row, sources_, of.place, part, member, change);
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
        const auto change = [&](float* row, std::int64_t n, const Run& run, std::int64_t i) {
            if (reader.stream.data) scale(reader.rho[run.sample * reader.n_tokens + run.token + i], n, row);
        };
        write(of.gradient->value, of.gradient->weight, of.row, group.gradients, of.place, part, member, change);
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

}  // namespace eaptk
