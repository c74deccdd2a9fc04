// Floats → codes, from arrays into arrays of the caller's, without the GIL.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include "bindings.h"
#include "memory.h"
#include "packing.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace bedplate {

namespace {

template <class T, int kDimensions>
using Array = nb::ndarray<T, nb::ndim<kDimensions>, nb::c_contig, nb::device::cpu>;

template <class T>
bool has_shape(const Array<T, 2>& array, std::size_t rows, std::size_t columns) {
    return array.shape(0) == rows && array.shape(1) == columns;
}

void quantize(const Array<const float, 2>& values, std::int64_t group,
              const std::optional<Array<const float, 1>>& importance, const Array<std::int8_t, 2>& codes,
              const Array<float, 2>& scales, const Array<float, 2>& offsets) {
    const std::size_t rows = values.shape(0), columns = values.shape(1);
    require(group > 0 && columns % static_cast<std::size_t>(group) == 0, "groups do not make a row");
    const std::size_t groups = columns / static_cast<std::size_t>(group);
    require(!importance || importance->size() == columns, "importance is not that of the columns");
    require(has_shape(codes, rows, columns) && has_shape(scales, rows, groups) &&
                has_shape(offsets, rows, groups),
            "what is to be written has another shape");
    const nb::gil_scoped_release unlocked;
    quantize_with_offsets(values.data(), static_cast<std::int64_t>(rows), static_cast<std::int64_t>(columns),
                          group, importance ? importance->data() : nullptr, codes.data(), scales.data(),
                          offsets.data());
}

void squares_of(const Array<const float, 2>& values, const Array<float, 1>& found) {
    require(found.size() == values.shape(0), "what is to be written has another shape");
    const nb::gil_scoped_release unlocked;
    squares(values.data(), static_cast<std::int64_t>(values.shape(0)),
            static_cast<std::int64_t>(values.shape(1)), found.data());
}

}  // namespace

void bind_packing(nb::module_& m) {
    m.def("quantize_with_offsets", &quantize, nb::kw_only(), "values"_a.noconvert(), "group"_a,
          "importance"_a.noconvert() = nb::none(), "codes"_a.noconvert(), "scales"_a.noconvert(),
          "offsets"_a.noconvert());
    m.def("squares", &squares_of, "values"_a.noconvert(), "found"_a.noconvert());
}

}  // namespace bedplate
