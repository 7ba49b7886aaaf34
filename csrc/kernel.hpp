// The inner loops over one block of a row that fits in the L1 cache.
#pragma once

#include <cstdint>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define EAPTK_CLONES __attribute__((target_clones("avx2", "default")))
#define EAPTK_AVX512 1
#else
#define EAPTK_CLONES
#define EAPTK_AVX512 0
#endif

namespace eaptk {

constexpr int kBlock = 4096;  // elements
constexpr int kStep = 32;     // a kernel takes a multiple of this many elements
constexpr int kRing = 256;    // indices that wait to be counted
constexpr int kAhead = 256;   // elements between what is read and what is fetched
constexpr int kLanes = 32;    // counters of bin 0 apart, one a lane: with heavy tails nearly all is there, and
                              // counting in one place would wait for each store to finish

// Sums over one block of n elements, powers of w − shift.
struct BlockSums {
    double n, shift, sum_abs, s1, s2, s3, s4;
    float min, max;

    double mean() const { return shift + s1 / n; }
    double variance() const { return s2 / n - (s1 / n) * (s1 / n); }
};

// Where |w| is counted: slot b is bin b, slot n what lies above the last edge. A float32 product decides wherever
// rounding cannot matter: if |w|·scale·(1 − 2^-21) and |w|·scale·(1 + 2^-21) have the same integer part, that is
// the slot. The few elements where they differ lie next to an edge and are compared with the edges in double.
struct Binning {
    const double* edges;
    int n;
    float scale_low, scale_high, limit;

    int slots() const { return n + 1; }
    int slot(float w) const;
};

// Bins [n + 1 edges] of at most 2^16 bins, edges[n] a normal float32 away from both ends of the format.
Binning make_binning(const double* edges, int n);

// Counters of one thread. With `paired` one counter is kept for each pair of slots (first · slots() + second):
// half the stores, which are what a histogram costs. Indices wait in a ring before they are counted, so that no
// load waits for a store still in flight.
struct Tally {
    const Binning* binning;
    bool paired;
    std::uint16_t* pairs;    // [slots, slots], from `lanes` on [kLanes] counters of bin 0
    std::uint32_t* singles;  // [slots], from `lanes` on the same
    int lanes;
    std::int32_t* ring;  // [kRing]
    int position;        // in the ring, of the oldest index
};

// Sums of n elements about `shift`; counts them too where `tally` is not null.
using Kernel = BlockSums (*)(const float* x, int n, double shift, Tally* tally);

// The kernel for this processor. `tally` is null exactly for `counting == false`; `shift` is 0 for `shifted == false`.
Kernel choose_kernel(bool counting, bool paired, bool shifted, bool portable);

// Count indices[0, n).
void count(Tally& tally, const std::int32_t* indices, int n);

}  // namespace eaptk
