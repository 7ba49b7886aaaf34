// The only file that knows pybind11. Arrays arrive validated from eaptk/sweep.py, results are double or int64; addresses
// of tensors from kernels/native.py, which keeps them alive.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "contraction.hpp"
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

using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

void contract(const std::vector<eaptk::Source>& sources, const std::vector<eaptk::Group>& groups, std::int64_t first,
              const std::vector<std::int64_t>& lengths, std::int64_t width, Address written, Address gradients,
              Address normed, std::int64_t runs, int threads, int lanes, Address out) {
    const eaptk::Scratch scratch{at<float>(written), at<float>(gradients), at<float>(normed), runs};
    py::gil_scoped_release release;
    eaptk::contract(sources, groups, first, lengths, width, scratch, threads, lanes, at<double>(out));
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.doc() = "Loops that are compiled; eaptk.sweep and eaptk.kernels are the public faces.";
    module.def("sweep", &sweep, "scores"_a, "rows"_a, "columns"_a.none(true), "edges"_a.none(true), "threads"_a,
               "portable"_a);
    module.def("weighted_column_sums", &weighted_column_sums, "scores"_a, "rows"_a, "columns"_a.none(true),
               "weights"_a, "absolute"_a, "threads"_a);
    module.def("row_dots", &row_dots, "scores"_a, "rows"_a, "columns"_a.none(true), "vector"_a, "threads"_a);
    module.def("read_sum", &read_sum, "data"_a, "threads"_a);
    module.def("has_avx512", &eaptk::has_avx512);

    py::class_<eaptk::Operand>(module, "Operand")
        .def(py::init([](Address data, bool bfloat16, std::int64_t sample, std::int64_t token, std::int64_t row) {
                 return eaptk::Operand{at<void>(data), bfloat16, sample, token, row};
             }),
             "data"_a, "bfloat16"_a, "sample"_a, "token"_a, "row"_a);
    py::class_<eaptk::Weight>(module, "Weight")
        .def(py::init([](Address data, std::int64_t head_dim, std::int64_t row, std::int64_t dimension,
                         std::int64_t column) {
                 return eaptk::Weight{at<float>(data), head_dim, row, dimension, column};
             }),
             "data"_a, "head_dim"_a, "row"_a, "dimension"_a, "column"_a);
    py::class_<eaptk::Source>(module, "Source")
        .def(py::init([](const eaptk::Operand& value, const eaptk::Operand& replacement, const eaptk::Weight& weight,
                         std::int64_t rows) {
                 return eaptk::Source{value, replacement, weight, rows};
             }),
             "value"_a, "replacement"_a, "weight"_a, "rows"_a);
    py::class_<eaptk::Gradient>(module, "Gradient")
        .def(py::init([](const eaptk::Operand& value, const eaptk::Weight& weight, std::int64_t rows,
                         std::int64_t reach) {
                 return eaptk::Gradient{value, weight, rows, reach};
             }),
             "value"_a, "weight"_a, "rows"_a, "reach"_a);
    py::class_<eaptk::Reader>(module, "Reader")
        .def(py::init([](const std::vector<eaptk::Gradient>& gradients, const eaptk::Operand& stream,
                         Address mean, Address rho, std::int64_t n_tokens, Address gain) {
                 return eaptk::Reader{gradients, stream, at<float>(mean), at<float>(rho), n_tokens, at<float>(gain)};
             }),
             "gradients"_a, "stream"_a, "mean"_a, "rho"_a, "n_tokens"_a, "gain"_a);
    module.def("contract", &contract, "sources"_a, "groups"_a, "first"_a, "lengths"_a, "width"_a, "written"_a,
               "gradients"_a, "normed"_a, "runs"_a, "threads"_a, "lanes"_a,
               "out"_a);
    module.attr("TOKENS") = eaptk::kTokens;
    module.def("padded", &eaptk::padded, "width"_a);
    module.def("pitch", &eaptk::pitch, "width"_a);
    module.def("lanes", &eaptk::lanes);
}
