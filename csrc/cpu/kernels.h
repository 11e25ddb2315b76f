// What the CPU kernels offer, torch-free: one table of functions per instruction set, chosen once (dispatch.cpp).
// Pointers are to contiguous (B, C, H, W) planes; shapes are checked by the caller.
#pragma once

#include "common/parallel.h"
#include "common/shapes.h"

namespace sodfast {

// One vector of γ under dynamic weight decay. Pointers to [channels] but for means; null where the kernel has no use.
template <class T>
struct DecayLayer {
  int64_t channels = 0, samples = 0;
  const T* means = nullptr;    // [samples, channels]
  const T* factors = nullptr;  // null: 1
  T* weight = nullptr;
  T* grad = nullptr;
  T *exp_avg = nullptr, *exp_avg_sq = nullptr;  // Adam's moments
};

struct AdamStep {
  double lr, beta1, beta2, eps;
  int64_t step;  // from 1
};

template <class T>
struct Kernels {
  // Every convolution adds bias (null: zero) and applies PReLU with slope (null: none) to what it writes.
  // weight: [out.total(), in.total(), k, k].
  void (*goctconv)(const GOctConvShape&, const T* const* xs, const T* weight, const T* bias, const T* slope,
                   T* const* ys, const Parallel&);
  void (*goctconv_grad_input)(const GOctConvShape&, const T* const* gys, const T* const* xs, const T* weight,
                              T* const* gxs, const Parallel&);
  void (*goctconv_grad_weight)(const GOctConvShape&, const T* const* gys, const T* const* xs, T* gweight,
                               const Parallel&);

  // weight: [maps.total(), 3, 3]; flip turns the kernel around (the gradient to the input).
  void (*depthwise)(const DepthwiseShape&, const T* const* xs, const T* weight, const T* bias, const T* slope,
                    bool flip, T* const* ys, const Parallel&);
  void (*depthwise_grad_weight)(const DepthwiseShape&, const T* const* gys, const T* const* xs, T* gweight,
                                const Parallel&);

  // weights[s]: [out.channels[s], in.channels[s], 3, 3], the branches one after the other.
  void (*dilated)(const DilatedShape&, const T* const* xs, const T* const* weights, const T* bias, const T* slope,
                  T* const* ys, const Parallel&);
  void (*dilated_grad_input)(const DilatedShape&, const T* const* gys, const T* const* weights, T* const* gxs,
                             const Parallel&);
  void (*dilated_grad_weight)(const DilatedShape&, const T* const* gys, const T* const* xs, T* const* gweights,
                              const Parallel&);

  // gamma, beta, slope, mean, var: [total]. Training fills mean and var (biased); otherwise it reads them.
  // channel_means: [batch, total], the spatial mean of the result. moments: [total, batch, 2], mean and Σ (x - mean)²
  // of every plane of xs, for training; null: they are measured.
  void (*norm_act)(const Pyramid&, const T* const* xs, const T* gamma, const T* beta, const T* slope,
                   const double* moments, T eps, bool training, T* mean, T* var, T* const* ys, T* channel_means,
                   const Parallel&);
  void (*norm_act_backward)(const Pyramid&, const T* const* gys, const T* const* xs, const T* gamma, const T* beta,
                            const T* slope, const T* mean, const T* var, T eps, bool training, T* const* gxs, T* ggamma,
                            T* gbeta, T* gslope, const Parallel&);
  // The same with a depthwise 3×3 behind it (weight: [total, 3, 3]); channel_means are of what it convolves. Training
  // fills out_moments, of ys.
  void (*norm_depthwise)(const Pyramid&, const T* const* xs, const T* gamma, const T* beta, const T* slope,
                         const T* weight, const double* moments, T eps, bool training, T* mean, T* var, T* const* ys,
                         T* channel_means, double* out_moments, const Parallel&);
  void (*norm_depthwise_backward)(const Pyramid&, const T* const* gys, const T* const* xs, const T* gamma,
                                  const T* beta, const T* slope, const T* mean, const T* var, const T* weight, T eps,
                                  bool training, T* const* gxs, T* ggamma, T* gbeta, T* gslope, T* gweight,
                                  const Parallel&);

  // Adds λ f mean|means| γ to the gradients where a layer has one, otherwise takes it from γ.
  void (*decay)(const DecayLayer<T>*, int64_t layers, double lambda, bool absolute);
  // The same, decoupled or not, and Adam's step; only reads the gradients.
  void (*adam_decay)(const DecayLayer<T>*, int64_t layers, double lambda, bool absolute, bool decoupled,
                     const AdamStep&);

  // out = x + x up(y) or x + up(y), up bilinear; x, out: [planes, rows, cols], y: [planes, from_rows, from_cols].
  void (*scfm)(const ScfmShape&, const T* x, const T* y, T* out, const Parallel&);
  // gx and gy from g, the gradient of out; without multiply gx is g itself and not written.
  void (*scfm_backward)(const ScfmShape&, const T* g, const T* x, const T* y, T* gx, T* gy, const Parallel&);

  // The thickened boundary of every plane of z, and the gradient to z from g, that of the result.
  void (*boundary)(const BoundaryShape&, const T* z, T* out, const Parallel&);
  void (*boundary_backward)(const BoundaryShape&, const T* g, const T* z, T* gz, const Parallel&);
  // sums: [planes, 2, 3], of p = sigmoid(logits) and of the boundaries of p and truth: Σ p g, Σ p, Σ g.
  void (*structure_polishing_sums)(const BoundaryShape&, const T* logits, const T* truth, T* sums, const Parallel&);
  // The gradient to the logits from g, that of the sums.
  void (*structure_polishing_sums_backward)(const BoundaryShape&, const T* g, const T* logits, const T* truth,
                                            T* glogits, const Parallel&);

  // theta, alpha, beta: [images], see common/dkd.h.
  void (*dkd_theta)(const DkdShape&, const T* student, const T* teacher, const T* truth, const DkdRule&, T* theta,
                    T* alpha, T* beta, const Parallel&);
  // loss: [images], θ f KL + (1 - θ) CE, means over pixels; gradient: its own to the student, or null. theta: [images].
  void (*dkd_loss)(const DkdShape&, const T* student, const T* teacher, const T* truth, const T* theta,
                   double temperature, double kl_factor, T* loss, T* gradient, const Parallel&);
  // gstudent = g · gradient, g: [images].
  void (*dkd_loss_backward)(const DkdShape&, const T* g, const T* gradient, T* gstudent, const Parallel&);
};

template <class T>
const Kernels<T>& kernels();

// The instruction set of kernels<float>(): "avx512", "avx2", "sse4.2" or "neon".
const char* cpu_isa();
int cpu_isa_count();  // how many this machine and build have, best first
const char* cpu_isa_name(int index);
bool cpu_isa_unknown();              // SODFAST_CPU_ISA asked for one that is not there
bool set_cpu_isa(const char* name);  // for tests; false if it is not there

}  // namespace sodfast
