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

constexpr int kBlock = 1024;  // elements: 4 KB of scores beside 4 KB of slots in flight
constexpr int kStep = 32;     // a kernel takes a multiple of this many elements
constexpr int kTables = 2;    // sub-tables, so that equal slots in a row do not wait for each other's store
constexpr int kLanes = 32;    // counters of bin 0 apart, one a lane: with heavy tails nearly all is there

// Sums over one block about a shift close to its mean; `n` elements.
struct BlockSums {
    double n, shift, sum_abs, s1, s2, s3, s4;
    float min, max;
};

// Where |w| is counted. A float32 product decides the slot wherever rounding cannot matter:
//
//     t = |w|·scale·(1 ± 2^-21) + (2^23 − 1/2)       (one fused multiply-add, rounded to an integer)
//
// holds the bin in its low bits (bin 0 as "−1" below a quarter of a bin). If both signs agree, the bin is
// exact; the few elements where they differ lie next to an edge and are compared with the edges in double.
// Slots are shifted by one: slot 0 and 1 are bin 0, slot b + 1 is bin b, slot n + 1 counts what lies above.
struct Binning {
    const double* edges;
    int n;
    float scale_low, scale_high, limit;

    int slots() const { return n + 2; }
    int slot(float w) const;
};

// Bins [n + 1 edges] of at most 2^16 bins, edges[n] a normal float32 away from both ends of the format.
Binning make_binning(const double* edges, int n);

// Counters of one thread. With `paired` one counter is kept for each pair of slots: half the stores, which are
// what a histogram costs. Slots of the block at hand are written to `slots`, and the previous block's are counted
// meanwhile, so that no load waits for a store still in flight.
struct Tally {
    const Binning* binning;
    bool paired;
    int counters;                     // slots² or, not paired, slots
    std::uint16_t* pairs[kTables];    // each [slots, slots], [kLanes] of two elements in bin 0, and one spare
    std::uint32_t* singles[kTables];  // each [slots], [kLanes] of one element in bin 0, and one spare
    std::uint32_t* slots;             // [kBlock] or, paired, [kBlock / 2]
    const std::uint32_t* previous;
};

using Kernel = BlockSums (*)(const float* x, int n, const Tally* tally);

// The kernel for this processor; `tally` may be null only for `counting == false`.
Kernel choose_kernel(bool counting, bool paired, bool portable);

// Count slots[begin, end) into the tables.
void count(const Tally& tally, const std::uint32_t* slots, int begin, int end);

}  // namespace eaptk
