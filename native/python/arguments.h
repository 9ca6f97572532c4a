// Arguments from Python: conversion of arrays and weights, checks of their shapes.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "base/threads.h"
#include "dispatch/isas.h"

namespace dsv4 {

namespace nb = nanobind;

using Floats = nb::ndarray<const float, nb::device::cpu>;
using MutableFloats = nb::ndarray<float, nb::device::cpu, nb::c_contig>;
using Bytes = nb::ndarray<const uint8_t, nb::device::cpu>;
using MutableBytes = nb::ndarray<uint8_t, nb::device::cpu, nb::c_contig>;
using MutableShorts = nb::ndarray<int16_t, nb::device::cpu, nb::c_contig>;
using MutableInts = nb::ndarray<int32_t, nb::device::cpu, nb::c_contig>;
using Longs = nb::ndarray<const int64_t, nb::device::cpu, nb::c_contig>;
using MutableLongs = nb::ndarray<int64_t, nb::device::cpu, nb::c_contig>;

[[noreturn]] inline void wrong(const std::string& what) { throw std::invalid_argument(what); }

inline std::string shape_of(const std::vector<int64_t>& shape) {
    std::string text = "[";
    for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
    return text + "]";
}

template <class Array>
void expect(const Array& array, const std::vector<int64_t>& shape, const std::string& name) {
    std::vector<int64_t> found;
    for (size_t i = 0; i < array.ndim(); ++i) found.push_back(static_cast<int64_t>(array.shape(i)));
    if (found != shape) wrong(name + ": shape " + shape_of(found) + ", expected " + shape_of(shape));
}

template <class Array>
void expect_dimensions(const Array& array, size_t count, const std::string& name) {
    if (array.ndim() != count)
        wrong(name + " has " + std::to_string(array.ndim()) + " dimensions, expected " + std::to_string(count));
}

// RAII: releases the GIL and sets the kernels' float mode in this thread.
struct Computing {
    nb::gil_scoped_release free;
    FloatMode mode;
};

// A weight's view and the arrays that it points into.
struct Stored {
    Weight view;
    Bytes codes, scales;
    Floats floats;
};

template <class Array>
void expect_rows(const Array& array, int64_t rows, int64_t columns, const std::string& name) {
    expect(array, {rows, columns}, name);
    if (rows > 0 && columns > 1 && array.stride(1) != 1) wrong(name + ": rows must be contiguous");
}

inline Stored stored_floats(const Floats& array, const std::string& name) {
    if (array.ndim() != 2) wrong(name + ": a weight has 2 dimensions");
    Stored s;
    s.floats = array;
    s.view.out = static_cast<int64_t>(array.shape(0));
    s.view.in = static_cast<int64_t>(array.shape(1));
    expect_rows(array, s.view.out, s.view.in, name);
    s.view.data = reinterpret_cast<const uint8_t*>(array.data());
    s.view.stride = array.stride(0) * static_cast<int64_t>(sizeof(float));
    return s;
}

// Converts a weight from Python: an fp32 matrix, or a tuple (kind, codes, scales or None), codes being bytes [out, .].
inline Stored stored_weight(nb::handle value, const std::string& name) {
    if (!nb::isinstance<nb::tuple>(value)) return stored_floats(nb::cast<Floats>(value), name);
    auto parts = nb::cast<nb::tuple>(value);
    std::string kind = nb::cast<std::string>(parts[0]);
    Stored s;
    s.codes = nb::cast<Bytes>(parts[1], false);
    if (s.codes.ndim() != 2) wrong(name + ": a weight has 2 dimensions");
    int64_t out = static_cast<int64_t>(s.codes.shape(0)), bytes = static_cast<int64_t>(s.codes.shape(1));
    expect_rows(s.codes, out, bytes, name);
    Weight& w = s.view;
    w.data = s.codes.data();
    w.out = out;
    w.stride = s.codes.stride(0);
    if (kind == "bf16") {
        w.kind = Kind::bf16;
        w.in = bytes / 2;
        return s;
    }
    if (kind != "fp8" && kind != "fp4") wrong(name + ": kind " + kind + "; allowed: bf16, fp8, fp4");
    w.kind = kind == "fp8" ? Kind::fp8 : Kind::fp4;
    w.in = w.kind == Kind::fp8 ? bytes : 2 * bytes;
    int64_t block_rows = w.kind == Kind::fp8 ? 128 : 1, block = w.kind == Kind::fp8 ? 128 : 32;
    int64_t rows = (out + block_rows - 1) / block_rows, columns = (w.in + block - 1) / block;
    if (nb::try_cast(parts[2], s.scales, false)) {
        expect_rows(s.scales, rows, columns, name + " (scales)");
        w.scales = s.scales.data();
        w.scale_stride = s.scales.stride(0);
    } else if (w.kind == Kind::fp8 && nb::try_cast(parts[2], s.floats, false)) {
        expect_rows(s.floats, rows, columns, name + " (scales)");
        w.float_scales = s.floats.data();
        w.scale_stride = s.floats.stride(0);
    } else {
        wrong(name + ": scales are bytes, or floats for fp8");
    }
    return s;
}

void define_ops(nb::module_& m);       // module_ops.cpp
void define_single(nb::module_& m);    // module_single.cpp
void define_training(nb::module_& m);  // module_training.cpp

}  // namespace dsv4
