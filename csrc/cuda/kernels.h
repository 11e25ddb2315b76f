// What the CUDA kernels offer, torch-free: device pointers to contiguous (B, C, H, W) planes, a stream, and an error
// code back. Shapes are checked by the caller. Nothing here waits for the device or allocates: where a kernel needs
// memory between two launches the caller hands it in. Results are the same bit for bit on every run.
#pragma once

#include "common/shapes.h"
#include "cuda/launch.h"

namespace sodfast::cuda {

enum class Type { f32, f16, bf16, f64 };  // f64 only where the kernels run on the host, for tests

// One number per channel, in a type of its own: under mixed precision parameters stay float32.
struct Vector {
  void* data = nullptr;
  Type type = Type::f32;
};

using Pointers = const void* const*;  // one per scale
using MutablePointers = void* const*;

// Convolutions add bias (null: zero) and apply PReLU with slope (null: none) to what they write.
// weight: [out.total(), in.total(), k, k].
cudaError_t goctconv(Type, const GOctConvShape&, Pointers xs, const void* weight, const void* bias, const void* slope,
                     MutablePointers ys, cudaStream_t);
// Without epilogue, and with the moments of every plane of ys: [out.total(), batch, 2], as of norm_depthwise.
int64_t goctconv_measured_workspace(const GOctConvShape&);
cudaError_t goctconv_measured(Type, const GOctConvShape&, Pointers xs, const void* weight, MutablePointers ys,
                              double* moments, void* workspace, cudaStream_t);
cudaError_t goctconv_grad_input(Type, const GOctConvShape&, Pointers gys, Pointers xs, const void* weight,
                                MutablePointers gxs, cudaStream_t);
// workspace: so many bytes; its contents do not matter.
int64_t goctconv_grad_weight_workspace(Type, const GOctConvShape&);
cudaError_t goctconv_grad_weight(Type, const GOctConvShape&, Pointers gys, Pointers xs, void* gweight, void* workspace,
                                 cudaStream_t);

// weight: [maps.total(), 3, 3]; flip turns the kernel around (the gradient to the input).
cudaError_t depthwise(Type, const DepthwiseShape&, Pointers xs, const void* weight, const void* bias, const void* slope,
                      bool flip, MutablePointers ys, cudaStream_t);
int64_t depthwise_grad_weight_workspace(Type, const DepthwiseShape&);
cudaError_t depthwise_grad_weight(Type, const DepthwiseShape&, Pointers gys, Pointers xs, void* gweight,
                                  void* workspace, cudaStream_t);

// A fused ILBlock: goctconv and two depthwise layers, three weights, biases and slopes. Where it would be slower as one
// launch than layer by layer, ilblock_is_one_launch says so.
bool ilblock_is_one_launch(const GOctConvShape&);
cudaError_t ilblock(Type, const GOctConvShape&, Pointers xs, Pointers weights, Pointers biases, Pointers slopes,
                    MutablePointers ys, cudaStream_t);

// weights[s]: [out.channels[s], in.channels[s], 3, 3], the branches one after the other.
cudaError_t dilated(Type, const DilatedShape&, Pointers xs, Pointers weights, const void* bias, const void* slope,
                    MutablePointers ys, cudaStream_t);
cudaError_t dilated_grad_input(Type, const DilatedShape&, Pointers gys, Pointers weights, MutablePointers gxs,
                               cudaStream_t);
int64_t dilated_grad_weight_workspace(Type, const DilatedShape&);
cudaError_t dilated_grad_weight(Type, const DilatedShape&, Pointers gys, Pointers xs, MutablePointers gweights,
                                void* workspace, cudaStream_t);

// gamma, beta, slope, mean, var: [total]. Training fills mean and var (biased) from the batch, otherwise they are
// copied from running_mean and running_var. moments: [total, batch, 2], double: mean and Σ (x - mean)² of every plane
// of xs, or null. channel_means: [batch, total], the spatial mean of the result.
struct NormActParameters {
  Vector gamma, beta, slope;
};
int64_t norm_act_workspace(Type, const Pyramid&);  // without moments, in training
cudaError_t norm_act(Type, const Pyramid&, Pointers xs, const NormActParameters&, Vector running_mean,
                     Vector running_var, const double* moments, double eps, bool training, Vector mean, Vector var,
                     MutablePointers ys, Vector channel_means, void* workspace, cudaStream_t);
int64_t norm_act_backward_workspace(Type, const Pyramid&);
cudaError_t norm_act_backward(Type, const Pyramid&, Pointers gys, Pointers xs, const NormActParameters&, Vector mean,
                              Vector var, double eps, bool training, MutablePointers gxs, Vector ggamma, Vector gbeta,
                              Vector gslope, void* workspace, cudaStream_t);
// The same followed by a depthwise 3x3, kernel: [total, 3, 3]; y itself is never written. out_moments: the moments of
// ys, or null.
int64_t norm_depthwise_workspace(Type, const Pyramid&);  // without moments, in training
cudaError_t norm_depthwise(Type, const Pyramid&, Pointers xs, const NormActParameters&, Vector running_mean,
                           Vector running_var, Vector kernel, const double* moments, double eps, bool training,
                           Vector mean, Vector var, MutablePointers ys, Vector channel_means, double* out_moments,
                           void* workspace, cudaStream_t);
int64_t norm_depthwise_backward_workspace(Type, const Pyramid&);
cudaError_t norm_depthwise_backward(Type, const Pyramid&, Pointers gys, Pointers xs, const NormActParameters&,
                                    Vector mean, Vector var, Vector kernel, double eps, bool training,
                                    MutablePointers gxs, Vector ggamma, Vector gbeta, Vector gslope, Vector gkernel,
                                    void* workspace, cudaStream_t);
// running = (1 - momentum) · running + momentum · batch, for channels[s] channels of counts[s] values each.
struct StatisticsUpdate {
  int scales = 0;
  int64_t channels[max_scales] = {}, counts[max_scales] = {};
  double momentum = 0;
};
cudaError_t update_stats(const StatisticsUpdate&, Vector running_mean, Vector running_var, Vector mean, Vector var,
                         cudaStream_t);

// One vector of γ under dynamic weight decay. Pointers to [channels] but for means; null where there is none.
struct DecayLayer {
  int64_t channels = 0, samples = 0;
  const void* means = nullptr;    // [samples, channels]
  const void* factors = nullptr;  // null: 1
  void *weight = nullptr, *grad = nullptr, *exp_avg = nullptr, *exp_avg_sq = nullptr;
};
struct AdamStep {
  double lr, beta1, beta2, eps;
  int64_t step;  // from 1
};
// Adds λ f mean|means| γ to the gradients where a layer has one, otherwise takes it from γ. One launch for all layers
// (for every 256 of them). With adam, also Adam's step, the decay decoupled or not; it only reads the gradients.
cudaError_t decay(Type, const DecayLayer*, int64_t layers, double lambda, bool absolute, cudaStream_t);
cudaError_t adam_decay(Type, const DecayLayer*, int64_t layers, double lambda, bool absolute, bool decoupled,
                       const AdamStep&, cudaStream_t);

// gx is not written without multiply: it is g.
cudaError_t scfm(Type, const ScfmShape&, const void* x, const void* y, void* out, cudaStream_t);
cudaError_t scfm_backward(Type, const ScfmShape&, const void* g, const void* x, const void* y, void* gx, void* gy,
                          cudaStream_t);

cudaError_t boundary(Type, const BoundaryShape&, const void* z, void* out, cudaStream_t);
int64_t boundary_backward_workspace(const BoundaryShape&);
cudaError_t boundary_backward(Type, const BoundaryShape&, const void* g, const void* z, void* gz, void* workspace,
                              cudaStream_t);
// sums and their gradient: [planes, 2, 3]; thin is thin_erosion.
int64_t structure_polishing_sums_workspace(const BoundaryShape&);
cudaError_t structure_polishing_sums(Type, const BoundaryShape&, const void* logits, const void* truth, void* sums,
                                     void* workspace, cudaStream_t);
int64_t structure_polishing_sums_backward_workspace(Type, const BoundaryShape&);
cudaError_t structure_polishing_sums_backward(Type, const BoundaryShape&, const void* gsums, const void* logits,
                                              const void* truth, void* glogits, void* workspace, cudaStream_t);

// As in cpu/kernels.h; theta, alpha, beta, loss and g: [images], gradient may be null.
int64_t dkd_workspace(const DkdShape&);
cudaError_t dkd_theta(Type, const DkdShape&, const void* student, const void* teacher, const void* truth,
                      const DkdRule&, void* theta, void* alpha, void* beta, void* workspace, cudaStream_t);
cudaError_t dkd_loss(Type, const DkdShape&, const void* student, const void* teacher, const void* truth,
                     const void* theta, double temperature, double kl_factor, void* loss, void* gradient,
                     void* workspace, cudaStream_t);
cudaError_t dkd_loss_backward(Type, const DkdShape&, const void* g, const void* gradient, void* gstudent, cudaStream_t);

}  // namespace sodfast::cuda
