// Every schema of torch.ops.sodfast, and the Python module sodfast._C. xs and grads are lists of (B, C_i, H/2^i,
// W/2^i), high resolution first; a scale may have no channels. bias and slope are an epilogue: prelu(result + bias,
// slope).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/library.h>

#include <map>
#include <string>
#include <vector>

#include "cpu/kernels.h"

STABLE_TORCH_LIBRARY(sodfast, m) {
  // Cross-scale convolution, weight [Σ out, Σ in, k, k]: stride 2 averages first; max-pool down, bilinear up.
  m.def(
      "goctconv(Tensor[] xs, Tensor weight, Tensor? bias, Tensor? slope, int[] out_channels, int stride) -> Tensor[]");
  // The same without epilogue, for training, on CUDA alone; and the moments of its result, as of
  // goctconv_norm_depthwise.
  m.def("goctconv_measured(Tensor[] xs, Tensor weight, int[] out_channels, int stride) -> (Tensor[], Tensor)");
  m.def("goctconv_grad_input(Tensor[] grads, Tensor[] xs, Tensor weight, int stride) -> Tensor[]");
  m.def("goctconv_grad_weight(Tensor[] grads, Tensor[] xs, Tensor weight, int stride) -> Tensor");

  // Depthwise 3×3 of every scale, weight [Σ C, 1, 3, 3].
  m.def("goctconv_depthwise(Tensor[] xs, Tensor weight, Tensor? bias, Tensor? slope, int dilation) -> Tensor[]");
  m.def("goctconv_depthwise_grad_input(Tensor[] grads, Tensor weight, int dilation) -> Tensor[]");
  m.def("goctconv_depthwise_grad_weight(Tensor[] grads, Tensor[] xs, Tensor weight, int dilation) -> Tensor");

  // A whole fused ILBlock, for inference: goctconv, then two depthwise 3×3, each with its bias and slope. On CUDA
  // alone.
  m.def(
      "ilblock(Tensor[] xs, Tensor[] weights, Tensor[] biases, Tensor[] slopes, int[] out_channels, int stride) -> "
      "Tensor[]");

  // Parallel dense 3×3 at several dilations, concatenated; out_channels is scales × dilations, 0: no such branch.
  m.def(
      "goctconv_dilated(Tensor[] xs, Tensor[] weights, Tensor? bias, Tensor? slope, int[] dilations, "
      "int[] out_channels) -> Tensor[]");
  m.def(
      "goctconv_dilated_grad_input(Tensor[] grads, Tensor[] weights, int[] dilations, int[] out_channels) -> Tensor[]");
  m.def(
      "goctconv_dilated_grad_weight(Tensor[] grads, Tensor[] xs, Tensor[] weights, int[] dilations, "
      "int[] out_channels) -> Tensor[]");

  // BatchNorm + PReLU; returns the result, batch mean, biased batch variance, spatial means of the result (B, Σ C).
  // moments, (Σ C, B, 2) float64, in training: mean and Σ (x - mean)² of every plane of xs, where they are known.
  m.def(
      "goctconv_norm_act(Tensor[] xs, Tensor weight, Tensor bias, Tensor slope, Tensor running_mean, "
      "Tensor running_var, bool training, float eps, Tensor? moments) -> (Tensor[], Tensor, Tensor, Tensor)");
  m.def(
      "goctconv_norm_act_backward(Tensor[] grads, Tensor[] xs, Tensor weight, Tensor bias, Tensor slope, Tensor mean, "
      "Tensor var, bool training, float eps) -> (Tensor[], Tensor, Tensor, Tensor)");
  // The same with a depthwise 3×3 (kernel, [Σ C, 1, 3, 3]) behind it. The last result: the moments of ys, in training.
  m.def(
      "goctconv_norm_depthwise(Tensor[] xs, Tensor weight, Tensor bias, Tensor slope, Tensor running_mean, "
      "Tensor running_var, Tensor kernel, Tensor? moments, bool training, float eps) -> "
      "(Tensor[], Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "goctconv_norm_depthwise_backward(Tensor[] grads, Tensor[] xs, Tensor weight, Tensor bias, Tensor slope, "
      "Tensor mean, Tensor var, Tensor kernel, bool training, float eps) -> (Tensor[], Tensor, Tensor, Tensor, "
      "Tensor)");
  // Running statistics from a batch's; channels and counts (values per channel) are per scale.
  m.def(
      "goctconv_update_stats_(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor mean, Tensor var, "
      "int[] channels, int[] counts, float momentum) -> ()");

  // Dynamic weight decay of all γ of a network: grads[i] += strength · factors[i] · mean|means[i]| · weights[i], or,
  // without grads, weights[i] -= that. means[i] is (samples, C_i); no factors: 1.
  m.def(
      "decay_(Tensor(a!)[] weights, Tensor(b!)[] grads, Tensor[] means, Tensor[] factors, float strength, "
      "bool absolute) -> ()");
  // The same fused with Adam's step for these weights; grads are only read.
  m.def(
      "adam_decay_(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor[] means, Tensor[] factors, float strength, bool absolute, bool decoupled, float lr, float beta1, "
      "float beta2, float eps, int step) -> ()");

  // x + x up(y), or without multiply x + up(y): up is bilinear to x's size.
  m.def("scfm(Tensor x, Tensor y, bool multiply) -> Tensor");
  // The first result, to x, is empty without multiply: it is grad itself.
  m.def("scfm_backward(Tensor grad, Tensor x, Tensor y, bool multiply) -> (Tensor, Tensor)");

  // Boundary of a soft map, thickened by a k×k max-pool; thin is 1 (z - erosion), 2 (dilation - z) or 3 (their sum).
  m.def("boundary(Tensor z, int k, int thin) -> Tensor");
  m.def("boundary_backward(Tensor grad, Tensor z, int k, int thin) -> Tensor");
  // (B, 2, 3): per image, of the map and of its boundary, Σ p g, Σ p, Σ g, where p = sigmoid(logits), g = truth.
  m.def("structure_polishing_sums(Tensor logits, Tensor truth, int k) -> Tensor");
  m.def("structure_polishing_sums_backward(Tensor grad, Tensor logits, Tensor truth, int k) -> Tensor");

  // θ, α and β of dynamic distillation, each (B,); a threshold below 0 is none.
  m.def(
      "dkd_theta(Tensor student_logits, Tensor teacher_logits, Tensor truth, float p, float threshold, "
      "float epsilon) -> (Tensor, Tensor, Tensor)");
  // (B,), per image the mean of theta · kl_factor · KL + (1 - theta) · CE; and its gradient to student_logits, or (0,).
  m.def(
      "dkd_loss(Tensor student_logits, Tensor teacher_logits, Tensor truth, Tensor theta, float temperature, "
      "float kl_factor, bool with_gradient) -> (Tensor, Tensor)");
  // grad is (B,), gradient what dkd_loss returned: their product.
  m.def("dkd_loss_backward(Tensor grad, Tensor gradient) -> Tensor");

  // A whole fused network: image (B, C, H, W) to (B, C', H, W); blob is a .sodfast file (csrc/plan/format.h).
  m.def("run_plan(Tensor x, Tensor blob) -> Tensor");
  // Seconds of each step, (repeats, steps) float64.
  m.def("time_plan(Tensor x, Tensor blob, int repeats) -> Tensor");
}

#define SODFAST_STRING_(x) #x
#define SODFAST_STRING(x) SODFAST_STRING_(x)

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled kernels of sodfast; importing it registers torch.ops.sodfast.";
  m.def("build_info", [] {
    return std::map<std::string, std::string>{{"compiler", SODFAST_COMPILER},
                                              {"version", SODFAST_VERSION},
                                              {"torch_abi", SODFAST_STRING(TORCH_TARGET_VERSION)}};
  });
  m.def("cpu_isa", [] { return std::string(sodfast::cpu_isa()); });
  m.def("cpu_isas", [] {
    std::vector<std::string> names;
    for (int i = 0; i < sodfast::cpu_isa_count(); ++i) names.emplace_back(sodfast::cpu_isa_name(i));
    return names;
  });
  m.def("cpu_isa_unknown", [] { return sodfast::cpu_isa_unknown(); });
  m.def("set_cpu_isa", [](const std::string& name) {
    if (!sodfast::set_cpu_isa(name.c_str()))
      throw pybind11::value_error("cpu instruction set '" + name + "' is not available here");
  });
}
