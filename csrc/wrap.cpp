// The only file that knows pybind11. Arrays arrive validated from eaptk/sweep.py; results are double or int64.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "sweep.hpp"

namespace py = pybind11;
using namespace pybind11::literals;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;
using Indices = Array<std::int64_t>;

// `scores` is [*, n_columns], float32 or float16 (numpy's character 'e').
eaptk::Rows rows_of(const py::array& scores, const Indices& rows, const std::optional<Indices>& columns) {
    const std::int64_t width = scores.shape(1);
    return {scores.data(),  scores.dtype().char_() == 'e', width, rows.data(), rows.size(),
            columns ? columns->data() : nullptr, columns ? columns->size() : width};
}

py::tuple sweep(const py::array& scores, const Indices& rows, const std::optional<Indices>& columns,
                const std::optional<Array<double>>& edges, int threads, bool portable) {
    const eaptk::Rows view = rows_of(scores, rows, columns);
    static_assert(sizeof(eaptk::Moments) == 7 * sizeof(double));
    Array<double> moments({view.n_rows, std::int64_t(7)});
    const std::int64_t n_bins = edges ? edges->size() - 1 : 0;
    Indices counts({view.n_rows, n_bins}), above(edges ? view.n_rows : 0);
    const eaptk::Bins bins{edges ? edges->data() : nullptr, n_bins};
    auto* moments_out = reinterpret_cast<eaptk::Moments*>(moments.mutable_data());
    auto *counts_out = counts.mutable_data(), *above_out = above.mutable_data();
    {
        py::gil_scoped_release release;
        eaptk::sweep(view, edges ? &bins : nullptr, threads, portable, moments_out, counts_out, above_out);
    }
    return py::make_tuple(moments, counts, above);
}

Array<double> weighted_column_sums(const py::array& scores, const Indices& rows, const std::optional<Indices>& columns,
                                   const Array<double>& weights, bool absolute, int threads) {
    const eaptk::Rows view = rows_of(scores, rows, columns);
    Array<double> out({std::int64_t(weights.shape(0)), view.n_selected});
    auto* result = out.mutable_data();
    {
        py::gil_scoped_release release;
        eaptk::weighted_column_sums(view, weights.data(), weights.shape(0), absolute, threads, result);
    }
    return out;
}

Array<double> row_dots(const py::array& scores, const Indices& rows, const std::optional<Indices>& columns,
                       const Array<double>& vector, int threads) {
    const eaptk::Rows view = rows_of(scores, rows, columns);
    Array<double> out(view.n_rows);
    auto* result = out.mutable_data();
    {
        py::gil_scoped_release release;
        eaptk::row_dots(view, vector.data(), threads, result);
    }
    return out;
}

double read_sum(const Array<float>& data, int threads) {
    py::gil_scoped_release release;
    return eaptk::read_sum(data.data(), data.size(), threads);
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.doc() = "Work on score rows at memory bandwidth; eaptk.sweep is the public face.";
    module.def("sweep", &sweep, "scores"_a, "rows"_a, "columns"_a.none(true), "edges"_a.none(true), "threads"_a,
               "portable"_a);
    module.def("weighted_column_sums", &weighted_column_sums, "scores"_a, "rows"_a, "columns"_a.none(true),
               "weights"_a, "absolute"_a, "threads"_a);
    module.def("row_dots", &row_dots, "scores"_a, "rows"_a, "columns"_a.none(true), "vector"_a, "threads"_a);
    module.def("read_sum", &read_sum, "data"_a, "threads"_a);
    module.def("has_avx512", &eaptk::has_avx512);
}
