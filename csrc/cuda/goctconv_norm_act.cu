// BatchNorm + PReLU of every scale (CSNet Eq. 5), with the spatial means that dynamic weight decay needs (Eq. 4).
//
//   z = (x - mean) · γ/√(var + ε) + β,   y = prelu(z, slope),   channel_means[b][c] = mean_{h,w} y
//
// Two launches for all scales in training, one otherwise or where the moments of x's planes are given; the backward
// takes two. A plane (one sample and channel) belongs to a warp, or to a block where it is large. First the moments: a
// thread adds up its values and their squares about the mean of its first 16, in float64 from 16 to 16, so that a large
// mean costs no digits. Then each plane's team combines its channel's moments over the batch and writes y, whose mean
// it sums on the way. The backward does the same with its three sums and recomputes z.
//
// Bytes: training reads x twice and writes y, 12 per value in float32 (the second read finds small maps in L2), with
// moments given 8; the backward reads x and the gradient twice: 20. Some 10 FLOPs per value: memory bounds both. The
// aim is the bandwidth.
#include "cuda/planes.h"

namespace sodfast::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(threads, 3) apply(const __grid_constant__ PlaneArguments<T> a) {
  using A = typename Sum<T>::type;
  __shared__ double shared[warps];
  const Team team(a);
  const NormAct<A> norm(a, team);
  double total[1] = {};
  if (team.active) {
    const bool packed = a.aligned[team.s];
    for (int64_t base = 0; base < team.area; base += step * team.size) {
      const int left = team.left(base);
      T x[step];
      A v[step], part = 0;
      read(team, a.xs[team.s] + team.plane * team.area, base, packed, x);
#pragma unroll
      for (int j = 0; j < step; ++j) {
        v[j] = norm(widen(x[j]));
        if (team.at(j, packed) < left) part += v[j];
      }
      write(team, a.ys[team.s] + team.plane * team.area, base, packed, v);
      total[0] += part;
    }
  }
  team.add_up(total, shared);
  if (team.active && team.lane == 0 && team.area > 0)
    put(a.channel_means, team.b * a.maps.total() + team.channel, total[0] / static_cast<double>(team.area));
}

template <class T>
__global__ void __launch_bounds__(threads, 2) sum_backward(const __grid_constant__ PlaneArguments<T> a) {
  using A = typename Sum<T>::type;
  __shared__ double shared[warps * 3];
  const Team team(a);
  const Channel<A> channel(a, team.channel);
  double sums[3] = {};  // of gz, gz · x̂ and the slope's gradient
  if (team.active) {
    const int64_t offset = team.plane * team.area;
    for (int64_t base = 0; base < team.area; base += step * team.size) {
      T x[step], gy[step];
      A part[3] = {};
      read(team, a.xs[team.s] + offset, base, a.aligned[team.s], x);
      read(team, a.gys[team.s] + offset, base, a.aligned[team.s], gy);
#pragma unroll
      for (int j = 0; j < step; ++j) {  // past the end the gradient is zero
        const A g = widen(gy[j]), normal = (widen(x[j]) - channel.mean) * channel.inverse;
        const A z = normal * channel.gamma + channel.beta, gz = z > 0 ? g : g * channel.slope;
        part[0] += gz, part[1] += gz * normal, part[2] += z > 0 ? A(0) : g * z;
      }
#pragma unroll
      for (int k = 0; k < 3; ++k) sums[k] += part[k];
    }
  }
  team.add_up(sums, shared);
  if (team.active && team.lane == 0)
#pragma unroll
    for (int k = 0; k < 3; ++k) a.partial[(team.channel * a.maps.batch + team.b) * 3 + k] = sums[k];
}

// gx = γ/√(var + ε) · (gz - mean(gz) - x̂ · mean(gz·x̂)); with fixed statistics the means do not enter.
template <class T>
__global__ void __launch_bounds__(threads, 2) apply_backward(const __grid_constant__ PlaneArguments<T> a) {
  using A = typename Sum<T>::type;
  const Team team(a);
  const Channel<A> channel(a, team.channel);
  double sums[3] = {};
  for (int64_t b = threadIdx.x % 32; b < a.maps.batch; b += 32)
#pragma unroll
    for (int k = 0; k < 3; ++k) sums[k] += team.active ? a.partial[(team.channel * a.maps.batch + b) * 3 + k] : 0.0;
#pragma unroll
  for (int k = 0; k < 3; ++k) sums[k] = warp_sum(sums[k]);
  if (!team.active) return;
  if (team.b == 0 && team.lane == 0) {
    put(a.gbeta, team.channel, sums[0]), put(a.ggamma, team.channel, sums[1]), put(a.gslope, team.channel, sums[2]);
  }
  const double count = static_cast<double>(a.maps.batch) * static_cast<double>(team.area);
  const A mean_gz = a.training ? A(sums[0] / count) : A(0), mean_gzx = a.training ? A(sums[1] / count) : A(0);
  const A scale = channel.gamma * channel.inverse;
  const int64_t offset = team.plane * team.area;
  for (int64_t base = 0; base < team.area; base += step * team.size) {
    T x[step], gy[step];
    A gx[step];
    read(team, a.xs[team.s] + offset, base, a.aligned[team.s], x);
    read(team, a.gys[team.s] + offset, base, a.aligned[team.s], gy);
#pragma unroll
    for (int j = 0; j < step; ++j) {
      const A g = widen(gy[j]), normal = (widen(x[j]) - channel.mean) * channel.inverse;
      const A z = normal * channel.gamma + channel.beta, gz = z > 0 ? g : g * channel.slope;
      gx[j] = scale * (gz - mean_gz - normal * mean_gzx);
    }
    write(team, a.ys[team.s] + offset, base, a.aligned[team.s], gx);
  }
}

__global__ void __launch_bounds__(threads)
    move_statistics(const __grid_constant__ StatisticsUpdate update, Vector running_mean, Vector running_var,
                    Vector mean, Vector var) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
  int64_t first = 0;
  for (int s = 0; s < update.scales; ++s) {
    const int64_t n = update.counts[s];
    if (i >= first && i < first + update.channels[s] && n > 0) {
      const double m = update.momentum, unbiased = n > 1 ? double(n) / double(n - 1) : 1;
      put(running_mean, i, (1 - m) * get<double>(running_mean, i) + m * get<double>(mean, i));
      put(running_var, i, (1 - m) * get<double>(running_var, i) + m * unbiased * get<double>(var, i));
    }
    first += update.channels[s];
  }
}

}  // namespace

int64_t norm_act_workspace(Type, const Pyramid& maps) {
  return maps.batch * maps.total() * 2 * static_cast<int64_t>(sizeof(double));
}

cudaError_t norm_act(Type type, const Pyramid& maps, Pointers xs, const NormActParameters& parameters,
                     Vector running_mean, Vector running_var, const double* moments, double eps, bool training,
                     Vector mean, Vector var, MutablePointers ys, Vector channel_means, void* workspace,
                     cudaStream_t stream) {
  return for_type(type, [&](auto zero) {
    using T = decltype(zero);
    PlaneArguments<T> a = plane_arguments<T>(maps, xs, nullptr, ys);
    a.parameters = parameters, a.running_mean = running_mean, a.running_var = running_var, a.mean = mean, a.var = var;
    a.channel_means = channel_means, a.eps = eps, a.training = training;
    a.partial = moments != nullptr ? const_cast<double*>(moments) : static_cast<double*>(workspace);
    const int64_t blocks = a.blocks.first[maps.scales];
    if (training && moments == nullptr && maps.batch > 0) {
      const cudaError_t error = launch(measure<T>, blocks, threads, stream, a);
      if (error != cudaSuccess) return error;
    }
    return launch(apply<T>, blocks, threads, stream, a);
  });
}

int64_t norm_act_backward_workspace(Type, const Pyramid& maps) {
  return maps.batch * maps.total() * 3 * static_cast<int64_t>(sizeof(double));
}

cudaError_t norm_act_backward(Type type, const Pyramid& maps, Pointers gys, Pointers xs,
                              const NormActParameters& parameters, Vector mean, Vector var, double eps, bool training,
                              MutablePointers gxs, Vector ggamma, Vector gbeta, Vector gslope, void* workspace,
                              cudaStream_t stream) {
  return for_type(type, [&](auto zero) {
    using T = decltype(zero);
    PlaneArguments<T> a = plane_arguments<T>(maps, xs, gys, gxs);
    a.parameters = parameters, a.mean = mean, a.var = var, a.ggamma = ggamma, a.gbeta = gbeta, a.gslope = gslope;
    a.eps = eps, a.training = training, a.partial = static_cast<double*>(workspace);
    const int64_t blocks = a.blocks.first[maps.scales];
    if (maps.batch > 0) {
      const cudaError_t error = launch(sum_backward<T>, blocks, threads, stream, a);
      if (error != cudaSuccess) return error;
    }
    return launch(apply_backward<T>, blocks, threads, stream, a);
  });
}

cudaError_t update_stats(const StatisticsUpdate& update, Vector running_mean, Vector running_var, Vector mean,
                         Vector var, cudaStream_t stream) {
  int64_t channels = 0;
  for (int s = 0; s < update.scales; ++s) channels += update.channels[s];
  return launch(move_statistics, divide_up<int64_t>(channels, threads), threads, stream, update, running_mean,
                running_var, mean, var);
}

}  // namespace sodfast::cuda
