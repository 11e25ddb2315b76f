// The geometry of the cross-scale convolution's arguments, checked; the same for every device.
#pragma once

#include "bind/common.h"

namespace sodfast {

inline GOctConvShape shape_for(const char* op, const Tensors& xs, const Tensor& weight, const int64_t* out_channels,
                               int64_t out_scales, int64_t stride) {
  GOctConvShape shape;
  shape.in = pyramid_of(op, "xs", xs);
  check(stride == 1 || stride == 2, op, "stride must be 1 or 2, got ", stride);
  shape.stride = stride;
  check_like(op, "weight", weight, xs[0]);
  check(weight.dim() == 4 && weight.size(2) == weight.size(3) && (weight.size(2) == 1 || weight.size(2) == 3), op,
        "weight must have shape (out, in, k, k) with k 1 or 3, got ", shape_of(weight));
  shape.kernel = weight.size(2);
  check(out_scales >= 1 && out_scales <= max_scales, op, "out_channels must name 1 to ", max_scales, " scales, got ",
        out_scales);
  Pyramid& out = shape.out;
  out.scales = static_cast<int>(out_scales);
  out.batch = shape.in.batch, out.height = shape.in.height / stride, out.width = shape.in.width / stride;
  for (int s = 0; s < out.scales; ++s) {
    check(out_channels[s] >= 0 && out_channels[s] <= weight.size(0), op, "out_channels[", s,
          "] must be 0 to the weight's ", weight.size(0), " rows, got ", out_channels[s]);
    out.channels[s] = out_channels[s];
  }
  check(weight.size(0) == out.total() && weight.size(1) == shape.in.total(), op, "weight must have shape (",
        out.total(), ", ", shape.in.total(), ", k, k) for these scales, got ", shape_of(weight));
  const int last = (shape.in.scales > out.scales ? shape.in.scales : out.scales) - 1;
  check(out.height > 0 && out.width > 0 && out.height % (1 << last) == 0 && out.width % (1 << last) == 0, op, "a ",
        shape.in.height, "x", shape.in.width, " input at stride ", stride, " gives ", out.height, "x", out.width,
        ", which ", last + 1, " scales cannot divide by ", 1 << last);
  return shape;
}

inline GOctConvShape shape_of_gradient(const char* op, const Tensors& grads, const Tensors& xs, const Tensor& weight,
                                       int64_t stride) {
  std::vector<int64_t> channels;
  for (const Tensor& g : grads) channels.push_back(g.dim() == 4 ? g.size(1) : -1);
  const GOctConvShape shape = shape_for(op, xs, weight, channels.data(), static_cast<int64_t>(channels.size()), stride);
  for (const Tensor& g : grads) check_like(op, "grads", g, xs[0]);
  check_pyramid(op, "grads", grads, shape.out);
  return shape;
}

}  // namespace sodfast
