// Work on score rows at memory bandwidth: pure C++, no Python, no torch. Arguments are validated by the caller.
#pragma once

#include <cstdint>

namespace eaptk {

// Some rows and some columns of a C-contiguous [*, n_columns] array of float32 or IEEE half precision.
struct Rows {
    const void* data;
    bool half;
    std::int64_t n_columns;
    const std::int64_t* rows;  // [n_rows]
    std::int64_t n_rows;
    const std::int64_t* columns;  // [n_selected], or null for all
    std::int64_t n_selected;
};

// Of one row: sums, and central moments Σ(w − mean)^p about the row's own mean.
struct Moments {
    double sum_abs = 0, sum = 0, m2 = 0, m3 = 0, m4 = 0, min = 0, max = 0;
};

// Bins of |w|: [edges[b], edges[b + 1]), the last one closed; edges[0] = 0 and equal spacing up to rounding.
struct Bins {
    const double* edges;  // [n + 1]
    std::int64_t n;
};

// One pass over memory. Fills moments [n_rows] and, where `bins` is not null, counts [n_rows, bins->n] and
// above [n_rows] (how many |w| exceed the last edge). A row is the work of one thread in a fixed order, so
// nothing depends on the number of threads. `portable` selects the kernel without AVX-512.
void sweep(const Rows& rows, const Bins* bins, int threads, bool portable, Moments* moments, std::int64_t* counts,
           std::int64_t* above);

// out[k, e] = Σ_i weights[k, i] · w[i, e] (or |w[i, e]|) over all n_columns, rows in order; weights [n_weights, n_rows].
void weighted_column_sums(const Rows& rows, const double* weights, std::int64_t n_weights, bool absolute, int threads,
                          double* out);

// out[i] = Σ_e w[i, e] · vector[e] over the selected columns.
void row_dots(const Rows& rows, const double* vector, int threads, double* out);

// Sum of n floats, as fast as memory delivers them: the yardstick of benchmarks/sweep.py.
double read_sum(const float* data, std::int64_t n, int threads);

// Whether this processor runs the AVX-512 kernel.
bool has_avx512();

}  // namespace eaptk
