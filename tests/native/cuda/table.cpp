// The CUDA kernels, run on the host, behind the table of the CPU kernels: the same cases then test both. Linked in
// place of csrc/cpu. SODFAST_CUDA_ON_HOST makes csrc/cuda compile with a C++ compiler.
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "check.h"
#include "cuda/half.h"
#include "cuda/kernels.h"

namespace sodfast {
namespace {

void check(cudaError_t error, const char* kernel) {
  if (error != cudaSuccess) test::fail(std::string(kernel) + " was refused", error, 0);
}

template <class T>
constexpr cuda::Type type = sizeof(T) == 8 ? cuda::Type::f64 : cuda::Type::f32;

template <class T>
cuda::Pointers in(const T* const* p) {
  return reinterpret_cast<cuda::Pointers>(p);
}
template <class T>
cuda::MutablePointers out(T* const* p) {
  return reinterpret_cast<cuda::MutablePointers>(p);
}
template <class T>
cuda::Vector vector(const T* p) {
  return {const_cast<T*>(p), type<T>};
}

// Exactly as large as was asked for, so that AddressSanitizer sees a kernel that takes more; full of NaN.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) : data_(std::malloc(static_cast<size_t>(bytes))) {
    std::memset(data_, 0xff, static_cast<size_t>(bytes));
  }
  ~Workspace() { std::free(data_); }
  Workspace(const Workspace&) = delete;
  operator void*() const { return data_; }

 private:
  void* data_;
};

// What is done in float32 is done in half precision too, but for what has tests of its own (ilblock.cpp).
template <class T, class F>
void too(const char* kernel, F in_half) {
  if constexpr (std::is_same_v<T, float>) test::in_half(kernel, in_half);
}

// Of x and of y, which is upsampled.
std::pair<int64_t, int64_t> sizes(const ScfmShape& s) {
  return {s.maps * s.rows * s.cols * s.channels, s.maps * s.from_rows * s.from_cols * s.channels};
}

template <class T, class H>
auto kernels_of(const DilatedShape& shape, const T* const* weights, H& h) {
  return [&shape, weights, &h](int s) { return h.copy(weights[s], shape.out.channels[s] * shape.in.channels[s] * 9); };
}

template <class T>
Kernels<T> table() {
  Kernels<T> k{};
  k.goctconv = [](const GOctConvShape& shape, const T* const* xs, const T* weight, const T* bias, const T* slope,
                  T* const* ys, const Parallel&) {
    check(cuda::goctconv(type<T>, shape, in(xs), weight, bias, slope, out(ys), nullptr), "goctconv");
  };
  k.goctconv_grad_input = [](const GOctConvShape& shape, const T* const* gys, const T* const* xs, const T* weight,
                             T* const* gxs, const Parallel&) {
    check(cuda::goctconv_grad_input(type<T>, shape, in(gys), in(xs), weight, out(gxs), nullptr), "grad_input");
  };
  k.goctconv_grad_weight = [](const GOctConvShape& shape, const T* const* gys, const T* const* xs, T* gweight,
                              const Parallel&) {
    const Workspace workspace(cuda::goctconv_grad_weight_workspace(type<T>, shape));
    check(cuda::goctconv_grad_weight(type<T>, shape, in(gys), in(xs), gweight, workspace, nullptr), "grad_weight");
  };
  k.depthwise = [](const DepthwiseShape& shape, const T* const* xs, const T* weight, const T* bias, const T* slope,
                   bool flip, T* const* ys, const Parallel&) {
    check(cuda::depthwise(type<T>, shape, in(xs), weight, bias, slope, flip, out(ys), nullptr), "depthwise");
    too<T>("depthwise", [&](auto& h) {
      const int64_t n = shape.maps.total();
      check(cuda::depthwise(h.type, shape, h.copies(shape.maps, xs), h.copy(weight, 9 * n), h.copy(bias, n),
                            h.copy(slope, n), flip, h.results(shape.maps, ys), nullptr),
            "depthwise in half precision");
    });
  };
  k.depthwise_grad_weight = [](const DepthwiseShape& shape, const T* const* gys, const T* const* xs, T* gweight,
                               const Parallel&) {
    const Workspace workspace(cuda::depthwise_grad_weight_workspace(type<T>, shape));
    check(cuda::depthwise_grad_weight(type<T>, shape, in(gys), in(xs), gweight, workspace, nullptr), "depthwise grad");
    too<T>("depthwise grad", [&](auto& h) {
      const Workspace own(cuda::depthwise_grad_weight_workspace(h.type, shape));
      check(cuda::depthwise_grad_weight(h.type, shape, h.copies(shape.maps, gys), h.copies(shape.maps, xs),
                                        h.result(gweight, 9 * shape.maps.total()), own, nullptr),
            "depthwise grad in half precision");
    });
  };
  k.dilated = [](const DilatedShape& shape, const T* const* xs, const T* const* weights, const T* bias, const T* slope,
                 T* const* ys, const Parallel&) {
    check(cuda::dilated(type<T>, shape, in(xs), in(weights), bias, slope, out(ys), nullptr), "dilated");
    too<T>("dilated", [&](auto& h) {
      const int64_t n = shape.out.total();
      check(cuda::dilated(h.type, shape, h.copies(shape.in, xs), h.list(kernels_of(shape, weights, h), shape.in.scales),
                          h.copy(bias, n), h.copy(slope, n), h.results(shape.out, ys), nullptr),
            "dilated in half precision");
    });
  };
  k.dilated_grad_input = [](const DilatedShape& shape, const T* const* gys, const T* const* weights, T* const* gxs,
                            const Parallel&) {
    check(cuda::dilated_grad_input(type<T>, shape, in(gys), in(weights), out(gxs), nullptr), "dilated grad_input");
    too<T>("dilated grad_input", [&](auto& h) {
      check(cuda::dilated_grad_input(h.type, shape, h.copies(shape.out, gys),
                                     h.list(kernels_of(shape, weights, h), shape.in.scales), h.results(shape.in, gxs),
                                     nullptr),
            "dilated grad_input in half precision");
    });
  };
  k.dilated_grad_weight = [](const DilatedShape& shape, const T* const* gys, const T* const* xs, T* const* gweights,
                             const Parallel&) {
    const Workspace workspace(cuda::dilated_grad_weight_workspace(type<T>, shape));
    check(cuda::dilated_grad_weight(type<T>, shape, in(gys), in(xs), out(gweights), workspace, nullptr),
          "dilated grad_weight");
    too<T>("dilated grad_weight", [&](auto& h) {
      const Workspace own(cuda::dilated_grad_weight_workspace(h.type, shape));
      const auto result = [&](int s) {
        return h.result(gweights[s], shape.out.channels[s] * shape.in.channels[s] * 9);
      };
      check(cuda::dilated_grad_weight(h.type, shape, h.copies(shape.out, gys), h.copies(shape.in, xs),
                                      h.list(result, shape.in.scales), own, nullptr),
            "dilated grad_weight in half precision");
    });
  };
  k.norm_act = [](const Pyramid& maps, const T* const* xs, const T* gamma, const T* beta, const T* slope,
                  const double* moments, T eps, bool training, T* mean, T* var, T* const* ys, T* channel_means,
                  const Parallel&) {
    const size_t n = static_cast<size_t>(maps.total());
    const std::vector<T> running_mean(mean, mean + n), running_var(var, var + n);
    const Workspace workspace(moments != nullptr ? 0 : cuda::norm_act_workspace(type<T>, maps));
    check(cuda::norm_act(type<T>, maps, in(xs), {vector(gamma), vector(beta), vector(slope)},
                         vector(running_mean.data()), vector(running_var.data()), moments, eps, training, vector(mean),
                         vector(var), out(ys), vector(channel_means), workspace, nullptr),
          "norm_act");
    too<T>("norm_act", [&](auto& h) {
      const Workspace own(moments != nullptr ? 0 : cuda::norm_act_workspace(h.type, maps));
      const int64_t channels = maps.total();
      check(cuda::norm_act(h.type, maps, h.copies(maps, xs), {vector(gamma), vector(beta), vector(slope)},
                           vector(running_mean.data()), vector(running_var.data()), moments, eps, training,
                           h.scratch(channels), h.scratch(channels), h.results(maps, ys),
                           h.scratch(maps.batch * channels), own, nullptr),
            "norm_act in half precision");
    });
  };
  k.norm_act_backward = [](const Pyramid& maps, const T* const* gys, const T* const* xs, const T* gamma, const T* beta,
                           const T* slope, const T* mean, const T* var, T eps, bool training, T* const* gxs, T* ggamma,
                           T* gbeta, T* gslope, const Parallel&) {
    const Workspace workspace(cuda::norm_act_backward_workspace(type<T>, maps));
    check(cuda::norm_act_backward(type<T>, maps, in(gys), in(xs), {vector(gamma), vector(beta), vector(slope)},
                                  vector(mean), vector(var), eps, training, out(gxs), vector(ggamma), vector(gbeta),
                                  vector(gslope), workspace, nullptr),
          "norm_act_backward");
    too<T>("norm_act_backward", [&](auto& h) {
      const Workspace own(cuda::norm_act_backward_workspace(h.type, maps));
      const int64_t n = maps.total();
      check(cuda::norm_act_backward(h.type, maps, h.copies(maps, gys), h.copies(maps, xs),
                                    {vector(gamma), vector(beta), vector(slope)}, vector(mean), vector(var), eps,
                                    training, h.results(maps, gxs), h.scratch(n), h.scratch(n), h.scratch(n), own,
                                    nullptr),
            "norm_act_backward in half precision");
    });
  };
  k.norm_depthwise = [](const Pyramid& maps, const T* const* xs, const T* gamma, const T* beta, const T* slope,
                        const T* weight, const double* moments, T eps, bool training, T* mean, T* var, T* const* ys,
                        T* channel_means, double* out_moments, const Parallel&) {
    const size_t n = static_cast<size_t>(maps.total());
    const std::vector<T> running_mean(mean, mean + n), running_var(var, var + n);
    const Workspace workspace(moments != nullptr ? 0 : cuda::norm_depthwise_workspace(type<T>, maps));
    check(cuda::norm_depthwise(type<T>, maps, in(xs), {vector(gamma), vector(beta), vector(slope)},
                               vector(running_mean.data()), vector(running_var.data()), vector(weight), moments, eps,
                               training, vector(mean), vector(var), out(ys), vector(channel_means), out_moments,
                               workspace, nullptr),
          "norm_depthwise");
    too<T>("norm_depthwise", [&](auto& h) {
      const Workspace own(moments != nullptr ? 0 : cuda::norm_depthwise_workspace(h.type, maps));
      const int64_t channels = maps.total();
      std::vector<double> moments_out(out_moments == nullptr ? 0 : static_cast<size_t>(2 * maps.batch * channels));
      check(cuda::norm_depthwise(h.type, maps, h.copies(maps, xs), {vector(gamma), vector(beta), vector(slope)},
                                 vector(running_mean.data()), vector(running_var.data()), vector(weight), moments, eps,
                                 training, h.scratch(channels), h.scratch(channels), h.results(maps, ys),
                                 h.scratch(maps.batch * channels),
                                 out_moments == nullptr ? nullptr : moments_out.data(), own, nullptr),
            "norm_depthwise in half precision");
    });
  };
  k.norm_depthwise_backward = [](const Pyramid& maps, const T* const* gys, const T* const* xs, const T* gamma,
                                 const T* beta, const T* slope, const T* mean, const T* var, const T* weight, T eps,
                                 bool training, T* const* gxs, T* ggamma, T* gbeta, T* gslope, T* gweight,
                                 const Parallel&) {
    const Workspace workspace(cuda::norm_depthwise_backward_workspace(type<T>, maps));
    check(cuda::norm_depthwise_backward(type<T>, maps, in(gys), in(xs), {vector(gamma), vector(beta), vector(slope)},
                                        vector(mean), vector(var), vector(weight), eps, training, out(gxs),
                                        vector(ggamma), vector(gbeta), vector(gslope), vector(gweight), workspace,
                                        nullptr),
          "norm_depthwise_backward");
    too<T>("norm_depthwise_backward", [&](auto& h) {
      const Workspace own(cuda::norm_depthwise_backward_workspace(h.type, maps));
      const int64_t n = maps.total();
      check(cuda::norm_depthwise_backward(h.type, maps, h.copies(maps, gys), h.copies(maps, xs),
                                          {vector(gamma), vector(beta), vector(slope)}, vector(mean), vector(var),
                                          vector(weight), eps, training, h.results(maps, gxs), h.scratch(n),
                                          h.scratch(n), h.scratch(n), h.scratch(9 * n), own, nullptr),
            "norm_depthwise_backward in half precision");
    });
  };
  const auto layers_of = [](const DecayLayer<T>* layers, int64_t number) {
    std::vector<cuda::DecayLayer> list;
    for (int64_t i = 0; i < number; ++i) {
      const DecayLayer<T>& l = layers[i];
      list.push_back({l.channels, l.samples, l.means, l.factors, l.weight, l.grad, l.exp_avg, l.exp_avg_sq});
    }
    return list;
  };
  static const auto convert = layers_of;
  k.decay = [](const DecayLayer<T>* layers, int64_t number, double lambda, bool absolute) {
    check(cuda::decay(type<T>, convert(layers, number).data(), number, lambda, absolute, nullptr), "decay");
  };
  k.adam_decay = [](const DecayLayer<T>* layers, int64_t number, double lambda, bool absolute, bool decoupled,
                    const AdamStep& a) {
    check(cuda::adam_decay(type<T>, convert(layers, number).data(), number, lambda, absolute, decoupled,
                           {a.lr, a.beta1, a.beta2, a.eps, a.step}, nullptr),
          "adam_decay");
  };
  k.dkd_theta = [](const DkdShape& shape, const T* student, const T* teacher, const T* truth, const DkdRule& rule,
                   T* theta, T* alpha, T* beta, const Parallel&) {
    const Workspace workspace(cuda::dkd_workspace(shape));
    check(cuda::dkd_theta(type<T>, shape, student, teacher, truth, rule, theta, alpha, beta, workspace, nullptr),
          "dkd_theta");
    too<T>("dkd_theta", [&](auto& h) {
      const Workspace own(cuda::dkd_workspace(shape));
      const int64_t n = shape.images, pixels = n * shape.pixels;
      check(cuda::dkd_theta(h.type, shape, h.copy(student, pixels), h.copy(teacher, pixels), h.copy(truth, pixels),
                            rule, h.result(theta, n), h.result(alpha, n), h.result(beta, n), own, nullptr),
            "dkd_theta in half precision");
    });
  };
  k.dkd_loss = [](const DkdShape& shape, const T* student, const T* teacher, const T* truth, const T* theta,
                  double temperature, double kl_factor, T* loss, T* gradient, const Parallel&) {
    const Workspace workspace(cuda::dkd_workspace(shape));
    check(cuda::dkd_loss(type<T>, shape, student, teacher, truth, theta, temperature, kl_factor, loss, gradient,
                         workspace, nullptr),
          "dkd_loss");
    too<T>("dkd_loss", [&](auto& h) {
      const Workspace own(cuda::dkd_workspace(shape));
      const int64_t n = shape.images, pixels = n * shape.pixels;
      check(cuda::dkd_loss(h.type, shape, h.copy(student, pixels), h.copy(teacher, pixels), h.copy(truth, pixels),
                           h.copy(theta, n), temperature, kl_factor, h.result(loss, n), h.result(gradient, pixels), own,
                           nullptr),
            "dkd_loss in half precision");
    });
  };
  k.dkd_loss_backward = [](const DkdShape& shape, const T* g, const T* gradient, T* gstudent, const Parallel&) {
    check(cuda::dkd_loss_backward(type<T>, shape, g, gradient, gstudent, nullptr), "dkd_loss_backward");
    too<T>("dkd_loss_backward", [&](auto& h) {
      const int64_t n = shape.images, pixels = n * shape.pixels;
      check(cuda::dkd_loss_backward(h.type, shape, h.copy(g, n), h.copy(gradient, pixels), h.result(gstudent, pixels),
                                    nullptr),
            "dkd_loss_backward in half precision");
    });
  };
  k.scfm = [](const ScfmShape& shape, const T* x, const T* y, T* out, const Parallel&) {
    check(cuda::scfm(type<T>, shape, x, y, out, nullptr), "scfm");
    too<T>("scfm", [&](auto& h) {
      const auto [fine, coarse] = sizes(shape);
      check(cuda::scfm(h.type, shape, h.copy(x, fine), h.copy(y, coarse), h.result(out, fine), nullptr),
            "scfm in half precision");
    });
  };
  k.scfm_backward = [](const ScfmShape& shape, const T* g, const T* x, const T* y, T* gx, T* gy, const Parallel&) {
    check(cuda::scfm_backward(type<T>, shape, g, x, y, gx, gy, nullptr), "scfm_backward");
    too<T>("scfm_backward", [&](auto& h) {
      const auto [fine, coarse] = sizes(shape);
      check(cuda::scfm_backward(h.type, shape, h.copy(g, fine), h.copy(x, fine), h.copy(y, coarse),
                                shape.multiply ? h.result(gx, fine) : nullptr, h.result(gy, coarse), nullptr),
            "scfm_backward in half precision");
    });
  };
  k.boundary = [](const BoundaryShape& shape, const T* z, T* out, const Parallel&) {
    check(cuda::boundary(type<T>, shape, z, out, nullptr), "boundary");
    too<T>("boundary", [&](auto& h) {
      const int64_t n = shape.planes * shape.rows * shape.cols;
      check(cuda::boundary(h.type, shape, h.copy(z, n), h.result(out, n), nullptr), "boundary in half precision");
    });
  };
  k.boundary_backward = [](const BoundaryShape& shape, const T* g, const T* z, T* gz, const Parallel&) {
    const Workspace workspace(cuda::boundary_backward_workspace(shape));
    check(cuda::boundary_backward(type<T>, shape, g, z, gz, workspace, nullptr), "boundary_backward");
    too<T>("boundary_backward", [&](auto& h) {
      const Workspace own(cuda::boundary_backward_workspace(shape));
      const int64_t n = shape.planes * shape.rows * shape.cols;
      check(cuda::boundary_backward(h.type, shape, h.copy(g, n), h.copy(z, n), h.result(gz, n), own, nullptr),
            "boundary_backward in half precision");
    });
  };
  k.structure_polishing_sums = [](const BoundaryShape& shape, const T* logits, const T* truth, T* sums,
                                  const Parallel&) {
    const Workspace workspace(cuda::structure_polishing_sums_workspace(shape));
    check(cuda::structure_polishing_sums(type<T>, shape, logits, truth, sums, workspace, nullptr), "sums");
    too<T>("sums", [&](auto& h) {
      const Workspace own(cuda::structure_polishing_sums_workspace(shape));
      const int64_t n = shape.planes * shape.rows * shape.cols;
      check(cuda::structure_polishing_sums(h.type, shape, h.copy(logits, n), h.copy(truth, n),
                                           h.result(sums, 6 * shape.planes), own, nullptr),
            "sums in half precision");
    });
  };
  k.structure_polishing_sums_backward = [](const BoundaryShape& shape, const T* g, const T* logits, const T* truth,
                                           T* glogits, const Parallel&) {
    const Workspace workspace(cuda::structure_polishing_sums_backward_workspace(type<T>, shape));
    check(cuda::structure_polishing_sums_backward(type<T>, shape, g, logits, truth, glogits, workspace, nullptr),
          "sums backward");
    too<T>("sums backward", [&](auto& h) {
      const Workspace own(cuda::structure_polishing_sums_backward_workspace(h.type, shape));
      const int64_t n = shape.planes * shape.rows * shape.cols;
      check(cuda::structure_polishing_sums_backward(h.type, shape, h.copy(g, 6 * shape.planes), h.copy(logits, n),
                                                    h.copy(truth, n), h.result(glogits, n), own, nullptr),
            "sums backward in half precision");
    });
  };
  return k;
}

}  // namespace

template <>
const Kernels<float>& kernels<float>() {
  static const Kernels<float> k = table<float>();
  return k;
}
template <>
const Kernels<double>& kernels<double>() {
  static const Kernels<double> k = table<double>();
  return k;
}
const char* cpu_isa() { return "cuda-on-host"; }
int cpu_isa_count() { return 1; }
const char* cpu_isa_name(int) { return "cuda-on-host"; }
bool cpu_isa_unknown() { return false; }
bool set_cpu_isa(const char*) { return true; }

}  // namespace sodfast
