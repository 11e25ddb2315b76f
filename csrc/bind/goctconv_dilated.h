// The geometry of the dilated bank's arguments, checked; the same for every device.
#pragma once

#include "bind/common.h"

namespace sodfast {

// `known` is the side whose tensors are given (the input, or the output's gradient); the other follows from the
// weights.
inline DilatedShape shape_for(const char* op, const Tensors& xs, bool xs_are_inputs, const Tensors& weights,
                              const std::vector<int64_t>& dilations, const std::vector<int64_t>& out_channels) {
  DilatedShape shape;
  const Pyramid known = pyramid_of(op, xs_are_inputs ? "xs" : "grads", xs);
  Pyramid other = known;
  const size_t n = dilations.size();
  check(n >= 1 && n <= max_dilations, op, "dilations must name 1 to ", max_dilations, " branches, got ", n);
  check(weights.size() == xs.size(), op, "weights must hold one tensor per scale: ", xs.size(), ", got ",
        weights.size());
  check(out_channels.size() == n * xs.size(), op, "out_channels must hold scales x dilations = ", n * xs.size(),
        " numbers, got ", out_channels.size());
  shape.dilations = static_cast<int>(n);
  for (size_t d = 0; d < n; ++d) {
    check(dilations[d] >= 1, op, "dilations[", d, "] must be at least 1, got ", dilations[d]);
    shape.dilation[d] = dilations[d];
  }
  for (int s = 0; s < known.scales; ++s) {
    const Tensor& w = weights[s];
    check_like(op, "weights", w, xs[0]);
    check(w.dim() == 4, op, "weights[", s, "] must have 4 dimensions, got ", shape_of(w));
    int64_t outs = 0;
    for (size_t d = 0; d < n; ++d) {
      const int64_t o = out_channels[s * n + d];
      check(o >= 0 && o <= w.size(0), op, "out_channels must be 0 to the weight's ", w.size(0), " rows, got ", o);
      shape.branch[s][d] = o;
      outs += o;
    }
    check(w.size(0) == outs && w.size(xs_are_inputs ? 1 : 0) == known.channels[s] && w.size(2) == 3 && w.size(3) == 3,
          op, "weights[", s, "] must have shape (", outs, ", in, 3, 3) with ", known.channels[s],
          xs_are_inputs ? " inputs" : " outputs", ", got ", shape_of(w));
    other.channels[s] = xs_are_inputs ? outs : w.size(1);
  }
  shape.in = xs_are_inputs ? known : other;
  shape.out = xs_are_inputs ? other : known;
  return shape;
}

}  // namespace sodfast
