// BatchNorm + PReLU of every scale (CSNet Eq. 5), with the spatial means that dynamic weight decay needs (Eq. 4).
//
//   z = (x - mean) · γ/√(var + ε) + β,   y = prelu(z, slope),   channel_means[b][c] = mean_{h,w} y
//
// Two launches for all scales in training, one otherwise; the backward takes two. A plane (one sample and channel)
// belongs to a warp, or to a block where it is large. First the planes' moments: 16 values at a time in registers are
// summed and measured about their own mean and combined in float64 (Chan's formula), so that a large mean costs no
// digits. Then each plane's team combines its channel's moments over the batch and writes y, whose mean it sums on
// the way. The backward does the same with its three sums and recomputes z.
//
// Bytes: training reads x twice and writes y, 12 per value in float32 (the second read finds small maps in L2); the
// backward reads x and the gradient twice: 20. Some 10 FLOPs per value: memory bounds both. The aim is the bandwidth.
#include "cuda/reduce.h"

namespace sodfast::cuda {
namespace {

constexpr int threads = 256, warps = threads / 32, step = 16, large_plane = 2048;

template <class T>
struct Arguments {
  Pyramid maps;
  const T* xs[max_scales];
  const T* gys[max_scales];
  T* ys[max_scales];         // backward: the gradients to the inputs
  bool aligned[max_scales];  // planes of whole, aligned packs
  NormActParameters parameters;
  Vector mean, var, running_mean, running_var, channel_means, ggamma, gbeta, gslope;
  double eps;
  bool training;
  double* partial;  // [channel][sample][values]
  BlockRanges blocks;
};

// The plane that a thread works on, and its place among those who do.
struct Team {
  int s, size, lane;  // size: 32, or a whole block
  int64_t b, c, channel, area, plane;
  bool active;  // else beyond the last plane
  template <class T>
  __device__ __forceinline__ explicit Team(const Arguments<T>& a) {
    int64_t rest;
    s = a.blocks.find(blockIdx.x, a.maps.scales, rest);
    area = a.maps.area(s);
    size = area > large_plane ? threads : 32;
    lane = static_cast<int>(threadIdx.x) % size;
    plane = rest * (threads / size) + static_cast<int>(threadIdx.x) / size;
    const int64_t samples = a.maps.batch > 0 ? a.maps.batch : 1;  // an empty batch still has parameters
    active = plane < samples * a.maps.channels[s];
    b = active ? divide(plane, a.maps.channels[s], c) : 0;
    c = active ? c : 0;
    channel = a.maps.begin(s) + c;
    if (a.maps.batch == 0) area = 0;
  }
  // The offset of value j of this thread's 16 from `base` on, in fours where they are packed.
  __device__ __forceinline__ int64_t at(int64_t base, int j, bool packed) const {
    return packed ? base + (j / 4 * size + lane) * 4 + j % 4 : base + j * size + lane;
  }
  // Sums over the team, the same in every thread of it.
  template <int n>
  __device__ __forceinline__ void add_up(double (&x)[n], double* shared) const {
    if (size == threads) {
      block_sums(x, shared, warps);
    } else {
#pragma unroll
      for (int k = 0; k < n; ++k) x[k] = warp_sum(x[k]);
    }
  }
};

// This thread's 16 values from `base` on; zero past the end. Returns how many there are.
template <class T, class A>
__device__ __forceinline__ int read(const Team& team, const T* plane, int64_t base, bool packed, A (&v)[step]) {
  int count = 0;
  if (packed) {
#pragma unroll
    for (int j = 0; j < step; j += 4) {
      const int64_t i = team.at(base, j, true);
      Pack<T, 4> pack{};
      if (i < team.area) {
        pack = *reinterpret_cast<const Pack<T, 4>*>(plane + i);
        count += 4;
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) v[j + k] = i < team.area ? widen(pack.v[k]) : A(0);
    }
  } else {
#pragma unroll
    for (int j = 0; j < step; ++j) {
      const int64_t i = team.at(base, j, false);
      v[j] = i < team.area ? widen(plane[i]) : A(0);
      count += i < team.area;
    }
  }
  return count;
}
template <class T, class A>
__device__ __forceinline__ void write(const Team& team, T* plane, int64_t base, bool packed, const A (&v)[step]) {
  if (packed) {
#pragma unroll
    for (int j = 0; j < step; j += 4) {
      Pack<T, 4> pack;
#pragma unroll
      for (int k = 0; k < 4; ++k) narrow(v[j + k], pack.v[k]);
      const int64_t i = team.at(base, j, true);
      if (i < team.area) *reinterpret_cast<Pack<T, 4>*>(plane + i) = pack;
    }
  } else {
#pragma unroll
    for (int j = 0; j < step; ++j) {
      const int64_t i = team.at(base, j, false);
      if (i < team.area) narrow(v[j], plane[i]);
    }
  }
}

struct Moments {
  double count = 0, mean = 0, m2 = 0;  // m2: Σ (x - mean)²
  __device__ __forceinline__ void add(double n, double other_mean, double other_m2) {
    const double all = count + n;
    if (n == 0) return;
    const double delta = other_mean - mean, part = n / all;
    mean += delta * part;
    m2 += other_m2 + delta * delta * count * part;
    count = all;
  }
  // Over the warp; the same in every lane.
  __device__ __forceinline__ void add_up() {
    for (int mask = 16; mask > 0; mask /= 2) {
      const double n = __shfl_xor_sync(whole_warp, count, mask), m = __shfl_xor_sync(whole_warp, mean, mask),
                   q = __shfl_xor_sync(whole_warp, m2, mask);
      add(n, m, q);
    }
    count = __shfl_sync(whole_warp, count, 0), mean = __shfl_sync(whole_warp, mean, 0);
    m2 = __shfl_sync(whole_warp, m2, 0);
  }
};

template <class T>
__global__ void __launch_bounds__(threads) measure(const __grid_constant__ Arguments<T> a) {
  using A = typename Sum<T>::type;
  __shared__ Moments shared[warps];
  const Team team(a);
  Moments moments;
  const T* x = a.xs[team.s] + team.plane * team.area;
  if (team.active) {
    for (int64_t base = 0; base < team.area; base += step * team.size) {
      A v[step];
      const int n = read(team, x, base, a.aligned[team.s], v);
      if (n == 0) break;  // only this thread's share is over
      A total = 0;
#pragma unroll
      for (int j = 0; j < step; ++j) total += v[j];
      const A mean = total / A(n);
      A rest = 0, square = 0;  // Σ (x - mean) is not exactly zero, since mean is rounded
#pragma unroll
      for (int j = 0; j < step; ++j) {
        const A d = team.at(base, j, a.aligned[team.s]) < team.area ? v[j] - mean : A(0);
        rest += d, square += d * d;
      }
      moments.add(n, double(mean) + double(rest / A(n)), double(square - rest * rest / A(n)));
    }
  }
  moments.add_up();
  if (team.size == threads) {
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = moments;
    __syncthreads();
    moments = Moments();
    for (int w = 0; w < warps; ++w) moments.add(shared[w].count, shared[w].mean, shared[w].m2);
  }
  if (team.active && team.lane == 0) {
    double* out = a.partial + (team.channel * a.maps.batch + team.b) * 2;
    out[0] = moments.mean, out[1] = moments.m2;
  }
}

template <class T>
__global__ void __launch_bounds__(threads) apply(const __grid_constant__ Arguments<T> a) {
  using A = typename Sum<T>::type;
  __shared__ double shared[warps];
  const Team team(a);
  double mean, var;
  if (a.training) {
    Moments moments;  // every warp of the team for itself
    for (int64_t b = threadIdx.x % 32; b < a.maps.batch; b += 32) {
      const double* p = a.partial + (team.channel * a.maps.batch + b) * 2;
      if (team.active) moments.add(static_cast<double>(team.area), p[0], p[1]);
    }
    moments.add_up();
    const bool any = moments.count > 0;  // nothing to average has no mean, as 0/0
    mean = any ? moments.mean : NAN, var = any ? moments.m2 / moments.count : NAN;
  } else {
    mean = get<double>(a.running_mean, team.channel), var = get<double>(a.running_var, team.channel);
  }
  if (team.active && team.b == 0 && team.lane == 0) put(a.mean, team.channel, mean), put(a.var, team.channel, var);
  const A m = A(mean), scale = A(get<double>(a.parameters.gamma, team.channel) / sqrt(A(var + a.eps))),
          beta = get<A>(a.parameters.beta, team.channel), slope = get<A>(a.parameters.slope, team.channel);
  double total[1] = {};
  if (team.active) {
    const bool packed = a.aligned[team.s];
    for (int64_t base = 0; base < team.area; base += step * team.size) {
      A v[step], part = 0;
      read(team, a.xs[team.s] + team.plane * team.area, base, packed, v);
#pragma unroll
      for (int j = 0; j < step; ++j) {
        v[j] = prelu((v[j] - m) * scale + beta, slope);
        if (team.at(base, j, packed) < team.area) part += v[j];
      }
      write(team, a.ys[team.s] + team.plane * team.area, base, packed, v);
      total[0] += part;
    }
  }
  team.add_up(total, shared);
  if (team.active && team.lane == 0 && team.area > 0)
    put(a.channel_means, team.b * a.maps.total() + team.channel, total[0] / static_cast<double>(team.area));
}

// What the backward needs of its channel.
template <class A>
struct Channel {
  A mean, inverse, gamma, beta, slope;
  template <class T>
  __device__ __forceinline__ Channel(const Arguments<T>& a, int64_t c)
      : mean(get<A>(a.mean, c)),
        inverse(A(1) / sqrt(A(get<double>(a.var, c) + a.eps))),
        gamma(get<A>(a.parameters.gamma, c)),
        beta(get<A>(a.parameters.beta, c)),
        slope(get<A>(a.parameters.slope, c)) {}
};

template <class T>
__global__ void __launch_bounds__(threads) sum_backward(const __grid_constant__ Arguments<T> a) {
  using A = typename Sum<T>::type;
  __shared__ double shared[warps * 3];
  const Team team(a);
  const Channel<A> channel(a, team.channel);
  double sums[3] = {};  // of gz, gz · x̂ and the slope's gradient
  if (team.active) {
    const int64_t offset = team.plane * team.area;
    for (int64_t base = 0; base < team.area; base += step * team.size) {
      A x[step], g[step], part[3] = {};
      read(team, a.xs[team.s] + offset, base, a.aligned[team.s], x);
      read(team, a.gys[team.s] + offset, base, a.aligned[team.s], g);
#pragma unroll
      for (int j = 0; j < step; ++j) {  // past the end the gradient is zero
        const A normal = (x[j] - channel.mean) * channel.inverse, z = normal * channel.gamma + channel.beta;
        const A gz = z > 0 ? g[j] : g[j] * channel.slope;
        part[0] += gz, part[1] += gz * normal, part[2] += z > 0 ? A(0) : g[j] * z;
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
__global__ void __launch_bounds__(threads) apply_backward(const __grid_constant__ Arguments<T> a) {
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
    A x[step], g[step];
    read(team, a.xs[team.s] + offset, base, a.aligned[team.s], x);
    read(team, a.gys[team.s] + offset, base, a.aligned[team.s], g);
#pragma unroll
    for (int j = 0; j < step; ++j) {
      const A normal = (x[j] - channel.mean) * channel.inverse, z = normal * channel.gamma + channel.beta;
      const A gz = z > 0 ? g[j] : g[j] * channel.slope;
      g[j] = scale * (gz - mean_gz - normal * mean_gzx);
    }
    write(team, a.ys[team.s] + offset, base, a.aligned[team.s], g);
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

template <class T>
Arguments<T> arguments_for(const Pyramid& maps, Pointers xs, Pointers gys, MutablePointers ys) {
  Arguments<T> a{};
  a.maps = maps;
  const int64_t samples = maps.batch > 0 ? maps.batch : 1;
  for (int s = 0; s < maps.scales; ++s) {
    a.xs[s] = static_cast<const T*>(xs[s]), a.ys[s] = static_cast<T*>(ys[s]);
    uintptr_t all = reinterpret_cast<uintptr_t>(xs[s]) | reinterpret_cast<uintptr_t>(ys[s]);
    if (gys != nullptr) {
      a.gys[s] = static_cast<const T*>(gys[s]);
      all |= reinterpret_cast<uintptr_t>(gys[s]);
    }
    a.aligned[s] = maps.area(s) % 4 == 0 && all % (4 * sizeof(T)) == 0;
    const int64_t planes_per_block = maps.area(s) > large_plane ? 1 : warps;
    a.blocks.first[s + 1] = a.blocks.first[s] + divide_up<int64_t>(samples * maps.channels[s], planes_per_block);
  }
  return a;
}

}  // namespace

int64_t norm_act_workspace(Type, const Pyramid& maps) {
  return maps.batch * maps.total() * 2 * static_cast<int64_t>(sizeof(double));
}

cudaError_t norm_act(Type type, const Pyramid& maps, Pointers xs, const NormActParameters& parameters,
                     Vector running_mean, Vector running_var, double eps, bool training, Vector mean, Vector var,
                     MutablePointers ys, Vector channel_means, void* workspace, cudaStream_t stream) {
  return for_type(type, [&](auto zero) {
    using T = decltype(zero);
    Arguments<T> a = arguments_for<T>(maps, xs, nullptr, ys);
    a.parameters = parameters, a.running_mean = running_mean, a.running_var = running_var, a.mean = mean, a.var = var;
    a.channel_means = channel_means, a.eps = eps, a.training = training, a.partial = static_cast<double*>(workspace);
    const int64_t blocks = a.blocks.first[maps.scales];
    if (training && maps.batch > 0) {
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
    Arguments<T> a = arguments_for<T>(maps, xs, gys, gxs);
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
