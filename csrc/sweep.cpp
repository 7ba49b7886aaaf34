#include "sweep.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernel.hpp"
#include "team.hpp"

namespace eaptk {
namespace {

// Run worker(task) for every task in [0, n_tasks), each worker in a thread of its own taking the next free task.
template <class Worker>
void parallel(std::vector<Worker>& workers, std::int64_t n_tasks) {
    Team team(int(workers.size()));
    team.run([&](int member) {
        team.phase(n_tasks, [&](std::int64_t task) { workers[member](task); });
    });
}

// IEEE half to single. Moving exponent and mantissa into place leaves the value short of a factor 2^112,
// subnormals included; inf and NaN have their exponent field filled.
EAPTK_CLONES
void widen(const std::uint16_t* x, int n, float* out) {
    for (int i = 0; i < n; ++i) {
        const std::uint32_t sign = std::uint32_t(x[i] & 0x8000u) << 16, rest = std::uint32_t(x[i] & 0x7fffu) << 13;
        float value;
        std::memcpy(&value, &rest, sizeof value);
        value *= 0x1p112f;
        std::uint32_t bits;
        std::memcpy(&bits, &value, sizeof bits);
        bits |= sign | (rest >= 0x0f800000u ? 0x7f800000u : 0u);
        std::memcpy(&out[i], &bits, sizeof bits);
    }
}

// The block [begin, begin + n) of a row's selected columns as float32: in place where it is that already.
const float* load(const Rows& rows, std::int64_t i, std::int64_t begin, int n, float* buffer) {
    const std::int64_t start = rows.rows[i] * rows.n_columns;
    if (rows.half) {
        const auto* row = static_cast<const std::uint16_t*>(rows.data) + start;
        if (!rows.columns) {
            widen(row + begin, n, buffer);
        } else {
            std::uint16_t gathered[kBlock];
            for (int j = 0; j < n; ++j) gathered[j] = row[rows.columns[begin + j]];
            widen(gathered, n, buffer);
        }
        return buffer;
    }
    const float* row = static_cast<const float*>(rows.data) + start;
    if (!rows.columns) return row + begin;
    for (int j = 0; j < n; ++j) buffer[j] = row[rows.columns[begin + j]];
    return buffer;
}

// Central moments of elements seen so far; `merge` follows Pébay (2008), eqs. 2.1 and 3.1.
class Accumulator {
public:
    // The shift must lie within a few standard deviations of the block's mean, so that moving to the exact mean
    // cancels next to nothing.
    void merge(const BlockSums& b) {
        const double delta = b.s1 / b.n, delta2 = delta * delta;
        const double m2 = b.s2 - b.n * delta2;
        const double m3 = b.s3 - 3 * delta * b.s2 + 2 * b.n * delta * delta2;
        const double m4 = b.s4 - 4 * delta * b.s3 + 6 * delta2 * b.s2 - 3 * b.n * delta2 * delta2;
        total_.sum_abs += b.sum_abs;
        total_.sum += b.n * b.shift + b.s1;
        total_.min = n_ == 0 ? double(b.min) : std::min(total_.min, double(b.min));
        total_.max = n_ == 0 ? double(b.max) : std::max(total_.max, double(b.max));

        const double n = n_ + b.n, d = b.shift + delta - mean_, d_n = d / n, nn = n_ * b.n;
        total_.m4 += m4 + d * d_n * d_n * d_n * nn * (n_ * n_ - nn + b.n * b.n) +
                     6 * d_n * d_n * (n_ * n_ * m2 + b.n * b.n * total_.m2) + 4 * d_n * (n_ * m3 - b.n * total_.m3);
        total_.m3 += m3 + d * d_n * d_n * nn * (n_ - b.n) + 3 * d_n * (n_ * m2 - b.n * total_.m2);
        total_.m2 += m2 + d * d_n * nn;
        mean_ += d_n * b.n;
        n_ = n;
    }

    const Moments& total() const { return total_; }

private:
    double n_ = 0, mean_ = 0;
    Moments total_;
};

double mean_of(const float* x, int n) {
    double sum = 0;
    for (int i = 0; i < n; ++i) sum += x[i];
    return sum / n;
}

// Whether the shift misses the block's mean by more than two standard deviations (or is no number).
bool too_far(const BlockSums& b) {
    const double delta = b.mean() - b.shift;
    return !(delta * delta <= 4 * b.variance());
}

// The last few elements of a row, fewer than a kernel's step.
BlockSums scalar_sums(const float* x, int n) {
    BlockSums out{double(n), mean_of(x, n), 0, 0, 0, 0, 0, x[0], x[0]};
    for (int i = 0; i < n; ++i) {
        const double d = x[i] - out.shift;
        out.sum_abs += std::fabs(double(x[i]));
        out.s1 += d;
        out.s2 += d * d;
        out.s3 += d * d * d;
        out.s4 += d * d * d * d;
        out.min = std::min(out.min, x[i]);
        out.max = std::max(out.max, x[i]);
    }
    return out;
}

// Add a table of pairs to the totals of each slot.
EAPTK_CLONES
void add_pairs(const std::uint16_t* table, int slots, std::int64_t* totals) {
    for (int first = 0; first < slots; ++first, table += slots) {
        std::uint32_t sum = 0;
        for (int second = 0; second < slots; ++second) {
            sum += table[second];
            totals[second] += table[second];
        }
        totals[first] += sum;
    }
}

// The counters of one thread; see Tally.
class Histogram {
public:
    Histogram(const Binning& binning, std::int64_t row_length)
        : slots_(binning.slots()),
          // 16-bit words hold slots, and adding up all pairs once a row must cost little beside the row itself.
          paired_(slots_ < 32768 && row_length >= slots_ * slots_), counters_(paired_ ? slots_ * slots_ : slots_),
          pairs_(paired_ ? counters_ + 2 * kLanes : 0), singles_(paired_ ? 0 : counters_ + 2 * kLanes),
          ring_(kRing), totals_(slots_),
          tally_{&binning, paired_, pairs_.data(), singles_.data(), int(counters_), ring_.data(), 0} {
        empty_ring();
    }

    // The tally points into the vectors, which a move hands over as they are.
    Histogram(Histogram&&) = default;

    bool paired() const { return paired_; }

    // For a block of n elements.
    Tally* tally_of(int n) {
        if (paired_ && (room_ -= n / 2) < 0) make_room(n / 2);
        return &tally_;
    }

    void count_tail(const float* x, int n) {
        for (int i = 0; i < n; ++i) ++totals_[tally_.binning->slot(x[i])];
    }

    void end_row(std::int64_t* counts, std::int64_t* above) {
        count(tally_, ring_.data(), kRing);
        empty_ring();
        flush();
        std::copy(totals_.begin(), totals_.end() - 1, counts);
        *above = totals_.back();
        std::fill(totals_.begin(), totals_.end(), 0);
    }

private:
    // Before a row's first indices there are kLanes counters in the ring that nobody reads.
    void empty_ring() {
        for (int i = 0; i < kRing; ++i) ring_[i] = std::int32_t(counters_ + kLanes + i % kLanes);
    }

    // A 16-bit counter may have taken every pair so far: look, and only if one has grown large empty them all.
    void make_room(int n) {
        const std::uint16_t largest = *std::max_element(pairs_.begin(), pairs_.end());
        room_ = 65535 - kRing - largest - n;
        if (room_ < 0) {
            flush();
            room_ = 65535 - kRing - n;
        }
    }

    void flush() {
        if (paired_) {
            add_pairs(pairs_.data(), int(slots_), totals_.data());
            for (int lane = 0; lane < kLanes; ++lane) totals_[0] += 2 * pairs_[counters_ + lane];
        } else {
            for (std::int64_t s = 0; s < slots_; ++s) totals_[s] += singles_[s];
            for (int lane = 0; lane < kLanes; ++lane) totals_[0] += singles_[counters_ + lane];
        }
        std::fill(pairs_.begin(), pairs_.end(), std::uint16_t(0));
        std::fill(singles_.begin(), singles_.end(), 0u);
        room_ = 65535 - kRing;
    }

    std::int64_t slots_;
    bool paired_;
    std::int64_t counters_;
    std::vector<std::uint16_t> pairs_;
    std::vector<std::uint32_t> singles_;
    std::vector<std::int32_t> ring_;
    std::vector<std::int64_t> totals_;
    int room_ = 65535 - kRing;  // pairs until a counter may overflow
    Tally tally_;
};

struct SweepWorker {
    const Rows& rows;
    Kernel about_zero, kernel, plain;  // plain: without counting
    std::vector<Histogram> histogram;  // one or none
    Moments* moments;
    std::int64_t *counts, *above, n_bins;
    std::vector<float> buffer = std::vector<float>(kBlock);

    void operator()(std::int64_t i) {
        Accumulator accumulator;
        // Powers are taken about 0 where the mean is small, which saves a subtraction, else about the previous
        // block's mean, which saves a pass over the block; where that turns out far off, again about its own.
        double shift = 0;
        for (std::int64_t begin = 0; begin < rows.n_selected; begin += kBlock) {
            const int n = int(std::min<std::int64_t>(kBlock, rows.n_selected - begin)), whole = n - n % kStep;
            const float* x = load(rows, i, begin, n, buffer.data());
            if (whole) {
                Tally* tally = histogram.empty() ? nullptr : histogram[0].tally_of(whole);
                BlockSums sums = (shift == 0 ? about_zero : kernel)(x, whole, shift, tally);
                const double mean = sums.mean();
                if (too_far(sums)) sums = plain(x, whole, mean, nullptr);
                shift = mean * mean <= sums.variance() ? 0 : mean;
                accumulator.merge(sums);
            }
            if (whole < n) {
                accumulator.merge(scalar_sums(x + whole, n - whole));
                if (!histogram.empty()) histogram[0].count_tail(x + whole, n - whole);
            }
        }
        moments[i] = accumulator.total();
        if (!histogram.empty()) histogram[0].end_row(counts + i * n_bins, above + i);
    }
};

EAPTK_CLONES
void add_weighted(const float* x, int n, double weight, bool absolute, double* out) {
    if (absolute) {
        for (int j = 0; j < n; ++j) out[j] += weight * std::fabs(double(x[j]));
    } else {
        for (int j = 0; j < n; ++j) out[j] += weight * double(x[j]);
    }
}

struct ColumnWorker {
    const Rows& rows;
    const double* weights;
    std::int64_t n_weights;
    bool absolute;
    double* out;
    const std::int64_t &first, &end;  // rows
    std::vector<float> buffer = std::vector<float>(kBlock);

    void operator()(std::int64_t block) {
        const std::int64_t begin = block * kBlock;
        const int n = int(std::min<std::int64_t>(kBlock, rows.n_selected - begin));
        for (std::int64_t i = first; i < end; ++i) {
            const float* x = load(rows, i, begin, n, buffer.data());
            for (std::int64_t k = 0; k < n_weights; ++k) {
                add_weighted(x, n, weights[k * rows.n_rows + i], absolute, out + k * rows.n_selected + begin);
            }
        }
    }
};

EAPTK_CLONES
double dot(const float* x, const double* y, int n) {
    constexpr int lanes = 16;
    double sums[lanes] = {};
    int i = 0;
    for (; i + lanes <= n; i += lanes) {
        for (int j = 0; j < lanes; ++j) sums[j] += double(x[i + j]) * y[i + j];
    }
    for (int j = 0; i < n; ++i, ++j) sums[j] += double(x[i]) * y[i];
    double total = 0;
    for (int j = 0; j < lanes; ++j) total += sums[j];
    return total;
}

struct DotWorker {
    const Rows& rows;
    const double* vector;
    double* out;
    std::vector<float> buffer = std::vector<float>(kBlock);

    void operator()(std::int64_t i) {
        double total = 0;
        for (std::int64_t begin = 0; begin < rows.n_selected; begin += kBlock) {
            const int n = int(std::min<std::int64_t>(kBlock, rows.n_selected - begin));
            total += dot(load(rows, i, begin, n, buffer.data()), vector + begin, n);
        }
        out[i] = total;
    }
};

EAPTK_CLONES
double sum_of(const float* x, std::int64_t n) {
    constexpr int lanes = 64;
    float sums[lanes] = {};
    std::int64_t i = 0;
    for (; i + lanes <= n; i += lanes) {
        for (int j = 0; j < lanes; ++j) sums[j] += x[i + j];
    }
    double total = 0;
    for (; i < n; ++i) total += x[i];
    for (int j = 0; j < lanes; ++j) total += sums[j];
    return total;
}

struct SumWorker {
    static constexpr std::int64_t chunk = 1 << 18;
    const float* data;
    std::int64_t n;
    double* out;

    void operator()(std::int64_t task) {
        out[task] = sum_of(data + task * chunk, std::min(chunk, n - task * chunk));
    }
};

}  // namespace

void sweep(const Rows& rows, const Bins* bins, int threads, bool portable, Moments* moments, std::int64_t* counts,
           std::int64_t* above) {
    const Binning binning = bins ? make_binning(bins->edges, int(bins->n)) : Binning{};
    std::vector<SweepWorker> workers;
    for (int t = 0; t < threads; ++t) {
        std::vector<Histogram> histogram;
        if (bins) histogram.emplace_back(binning, rows.n_selected);
        const bool counting = bins != nullptr, paired = counting && histogram[0].paired();
        workers.push_back({rows, choose_kernel(counting, paired, false, portable),
                           choose_kernel(counting, paired, true, portable),
                           choose_kernel(false, false, true, portable), std::move(histogram), moments, counts, above,
                           bins ? bins->n : 0});
    }
    parallel(workers, rows.n_rows);
}

void weighted_column_sums(const Rows& rows, const double* weights, std::int64_t n_weights, bool absolute, int threads,
                          double* out) {
    std::fill(out, out + n_weights * rows.n_selected, 0.0);
    // A block of columns lies all over the file, so rows are read a panel at a time, which memory holds; of long
    // rows some, as the sums pass through the caches once a panel. Each sum takes rows in order, whatever the panels.
    constexpr std::int64_t panel_bytes = 256 << 20, fewest = 8;
    const std::int64_t panel = std::max(fewest, panel_bytes / (rows.n_columns * (rows.half ? 2 : 4)));
    std::int64_t first = 0, end = 0;
    std::vector<ColumnWorker> workers;
    for (int t = 0; t < threads; ++t) workers.push_back({rows, weights, n_weights, absolute, out, first, end});
    for (; first < rows.n_rows; first = end) {
        end = std::min(rows.n_rows, first + panel);
        parallel(workers, (rows.n_selected + kBlock - 1) / kBlock);
    }
}

void row_dots(const Rows& rows, const double* vector, int threads, double* out) {
    std::vector<DotWorker> workers;
    for (int t = 0; t < threads; ++t) workers.push_back({rows, vector, out});
    parallel(workers, rows.n_rows);
}

double read_sum(const float* data, std::int64_t n, int threads) {
    const std::int64_t tasks = (n + SumWorker::chunk - 1) / SumWorker::chunk;
    std::vector<double> sums(tasks);
    std::vector<SumWorker> workers(threads, SumWorker{data, n, sums.data()});
    parallel(workers, tasks);
    double total = 0;
    for (const double sum : sums) total += sum;
    return total;
}

}  // namespace eaptk
