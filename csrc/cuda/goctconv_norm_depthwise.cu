// BatchNorm + PReLU + depthwise 3x3 of every scale in training: the convolution normalises and activates what it reads.
//
//   y = prelu(z),  z = x̂ · γ + β,  x̂ = (x - mean) / √(var + ε),      out[p] = Σ_t w[t] · y[p + t],  zero outside
//
// y, which a norm of its own would write and a convolution read again (and keep for its backward), is never in memory.
// As in goctconv_norm_act.cu a plane belongs to a warp or a block. A warp takes 30 items of 4 x 4 pixels at a time,
// next to each other: a lane reads its item's rows and the two around it, all at once, and normalises them; what lies
// to the left and to the right the lanes beside hand over, of which the outermost two do nothing else. On the way it
// sums y, whose means dynamic weight decay needs, and the moments of what it writes, which spare the next norm its own
// pass over them: with moments given one launch, else one before for x's.
//
// The backward reads x and the gradient g twice. What reaches y is the convolution turned around, made again each time:
//
//   gy[q] = Σ_t w[t] · g[q - t],   gw[t] = Σ y[q] · g[q - t],   gz = gy · prelu'(z),
//   gx = γ/√(var + ε) · (gz - mean(gz) - x̂ · mean(gz·x̂))
//
// First the sums over the planes (of gz, gz·x̂, the slope's gradient, gw), then gx from their totals.
//
// Bytes per value in float32: forward 8 (12 with x's moments to be made) against 20 for the two ops; backward 20
// against 36. Some 50 FLOPs per value forward, 90 backward. Memory bounds both in float32, where the aim is the
// bandwidth; in half precision the 36 instructions per value forward and 78 backward do.
#include "cuda/depthwise_rows.h"
#include "cuda/planes.h"

namespace sodfast::cuda {
namespace {

constexpr int strip = 4, backward_sums = 12;

// A plane in items of 4 x 4 pixels, one strip of four rows after the other: an item's neighbours in a row are those
// before and after it.
struct Items {
  int rows, cols, across, count;
  __device__ __forceinline__ Items(const Team& team, const Pyramid& maps)
      : rows(static_cast<int>(maps.rows(team.s))),
        cols(static_cast<int>(maps.cols(team.s))),
        across(divide_up(cols, lane_pixels)),
        count(team.active && team.area > 0 ? across * divide_up(rows, strip) : 0) {}

  // Calls f(y, x, own) for every item of this thread's and, with own false, for those beside its warp's, or any others
  // where there are none: they are beside the map's border, beyond which nobody looks. All lanes of a warp call f
  // together.
  template <class F>
  __device__ __forceinline__ void for_each(const Team& team, const F& f) const {
    constexpr int own_lanes = 30;
    const int lane = team.lane % 32, step = team.size / 32 * own_lanes;
    for (int first = team.lane / 32 * own_lanes; first < count; first += step) {
      const int item = first + lane - 1, nearest = item < 0 ? 0 : least(item, count - 1);
      const int row = nearest / across, col = nearest - row * across;
      f(row * strip, col * lane_pixels, item == nearest && lane > 0 && lane <= own_lanes);
    }
  }
};

template <bool aligned, class T>
__device__ __forceinline__ void write_quad(T* out, int x, int cols, const Pack<T, lane_pixels>& v) {
  if (aligned) {
    *reinterpret_cast<Pack<T, lane_pixels>*>(out) = v;
  } else {
#pragma unroll
    for (int i = 0; i < lane_pixels; ++i)
      if (x + i < cols) out[i] = v.v[i];
  }
}

// The items of one plane: adds its values to `total` and `sums`.
template <bool aligned, class T, class A>
__device__ __forceinline__ void convolve_plane(const PlaneArguments<T>& a, const Team& team, const NormAct<A>& norm,
                                               double& total, ThreadMoments<A>& sums) {
  const Items items(team, a.maps);
  const int rows = items.rows, cols = items.cols;
  A w[9];
#pragma unroll
  for (int t = 0; t < 9; ++t) w[t] = team.active ? get<A>(a.kernel, team.channel * 9 + t) : A(0);
  const T* in = a.xs[team.s] + team.plane * team.area;
  T* out = a.ys[team.s] + team.plane * team.area;
  items.for_each(team, [&](int y, int x, bool own) {
    Pack<T, lane_pixels> stored[strip + 2];
    read_quads<aligned>(in, y - 1, x, rows, cols, stored);
    A sum[strip][lane_pixels] = {}, part = 0;
#pragma unroll
    for (int r = -1; r <= strip; ++r) {
      A four[lane_pixels], v[6];
      widen(stored[r + 1], four);
      // Outside there are zeros, which a norm of zeros leaves alone.
      const NormAct<A> of_row = r == 0 || (y + r >= 0 && y + r < rows) ? norm : norm.of_zeros();
#pragma unroll
      for (int i = 0; i < lane_pixels; ++i) {
        four[i] = of_row(four[i]);
        if (!aligned) four[i] = x + i < cols ? four[i] : A(0);
        if (r >= 0 && r < strip) part += four[i];
      }
      with_neighbours(four, x, cols, v);
#pragma unroll
      for (int dy = 0; dy < 3; ++dy) {  // row r is tap dy of the output row r + 1 - dy
        const int o = r + 1 - dy;
        if (o < 0 || o >= strip) continue;
#pragma unroll
        for (int i = 0; i < lane_pixels; ++i)
#pragma unroll
          for (int dx = 0; dx < 3; ++dx) sum[o][i] += w[dy * 3 + dx] * v[i + dx];
      }
    }
    if (!own) return;
    total += part;
    const int n = aligned ? lane_pixels : least(lane_pixels, cols - x);
#pragma unroll
    for (int r = 0; r < strip; ++r) {
      if (y + r >= rows) break;
      Pack<T, lane_pixels> result;
      narrow(sum[r], result);
      write_quad<aligned>(out + static_cast<int64_t>(y + r) * cols + x, x, cols, result);
      A read[lane_pixels];  // the moments are of what the next norm will read
      widen(result, read);
      if (!aligned)
#pragma unroll
        for (int i = 0; i < lane_pixels; ++i) read[i] = i < n ? read[i] : A(0);
      if (a.moments != nullptr) sums.add(read, n, [&](int i) { return aligned || i < n; });
    }
    sums.flush();
  });
}

template <class T>
__global__ void __launch_bounds__(threads, 2) convolve(const __grid_constant__ PlaneArguments<T> a) {
  using A = typename Sum<T>::type;
  __shared__ double shared[warps];
  __shared__ Moments shared_moments[warps];
  const Team team(a);
  const NormAct<A> norm(a, team);
  double total[1] = {};
  ThreadMoments<A> sums;
  if (a.aligned[team.s])
    convolve_plane<true>(a, team, norm, total[0], sums);
  else
    convolve_plane<false>(a, team, norm, total[0], sums);
  team.add_up(total, shared);
  if (team.active && team.lane == 0 && team.area > 0)
    put(a.channel_means, team.b * a.maps.total() + team.channel, total[0] / static_cast<double>(team.area));
  if (a.moments != nullptr) sums.moments().write(team, a.maps.batch, shared_moments, a.moments);
}

// Calls f(x, g) for every pixel of the thread's items, g[t] being the gradient that tap t of the kernel read the pixel
// for; writes what f returns where `writes`. done() follows every item.
template <bool writes, bool aligned, class T, class F, class Done>
__device__ __forceinline__ void for_each_pixel(const PlaneArguments<T>& a, const Team& team, const F& f,
                                               const Done& done) {
  using A = typename Sum<T>::type;
  const Items items(team, a.maps);
  const int rows = items.rows, cols = items.cols;
  const int64_t offset = team.plane * team.area;
  const T *in = a.xs[team.s] + offset, *gradient = a.gys[team.s] + offset;
  items.for_each(team, [&](int y, int x, bool own) {
    Pack<T, lane_pixels> gradients[strip + 2], values[strip];
    read_quads<aligned>(gradient, y - 1, x, rows, cols, gradients);
    read_quads<aligned>(in, y, x, rows, cols, values);
    A lines[strip + 2][6];
#pragma unroll
    for (int r = 0; r < strip + 2; ++r) {
      A four[lane_pixels];
      widen(gradients[r], four);
      with_neighbours(four, x, cols, lines[r]);
    }
    if (!own) return;
#pragma unroll
    for (int r = 0; r < strip; ++r) {
      if (y + r >= rows) break;
      A of_row[lane_pixels], results[lane_pixels] = {};
      widen(values[r], of_row);
#pragma unroll
      for (int i = 0; i < lane_pixels; ++i) {
        A g[9];
#pragma unroll
        for (int t = 0; t < 9; ++t) g[t] = lines[r + 2 - t / 3][i + 2 - t % 3];
        if (aligned || x + i < cols) results[i] = f(of_row[i], g);
      }
      if (writes) {
        Pack<T, lane_pixels> result;
        narrow(results, result);
        write_quad<aligned>(a.ys[team.s] + offset + static_cast<int64_t>(y + r) * cols + x, x, cols, result);
      }
    }
    done();
  });
}
template <bool writes, class T, class F, class Done>
__device__ __forceinline__ void for_each_pixel(const PlaneArguments<T>& a, const Team& team, const F& f,
                                               const Done& done) {
  a.aligned[team.s] ? for_each_pixel<writes, true>(a, team, f, done) : for_each_pixel<writes, false>(a, team, f, done);
}

template <class T>
__global__ void __launch_bounds__(threads, 2) sum_backward(const __grid_constant__ PlaneArguments<T> a) {
  using A = typename Sum<T>::type;
  __shared__ double shared[warps * backward_sums];
  const Team team(a);
  const Channel<A> channel(a, team.channel);
  A w[9];
#pragma unroll
  for (int t = 0; t < 9; ++t) w[t] = team.active ? get<A>(a.kernel, team.channel * 9 + t) : A(0);
  double sums[backward_sums] = {};
  A part[backward_sums] = {};
  for_each_pixel<false>(
      a, team,
      [&](A x, const A(&g)[9]) {
        const A normal = (x - channel.mean) * channel.inverse, z = normal * channel.gamma + channel.beta;
        const A y = z > 0 ? z : z * channel.slope;
        A gy = 0;
#pragma unroll
        for (int t = 0; t < 9; ++t) gy += w[t] * g[t], part[3 + t] += y * g[t];
        const A gz = z > 0 ? gy : gy * channel.slope;
        part[0] += gz, part[1] += gz * normal;
        if (!(z > 0)) part[2] += gy * z;
        return gz;
      },
      [&] {
#pragma unroll
        for (int k = 0; k < backward_sums; ++k) sums[k] += part[k], part[k] = 0;
      });
  team.add_up(sums, shared);
  if (team.active && team.lane == 0)
#pragma unroll
    for (int k = 0; k < backward_sums; ++k)
      a.partial[(team.channel * a.maps.batch + team.b) * backward_sums + k] = sums[k];
}

// The total over the batch of sum k of the team's channel; the same in every lane.
template <class T>
__device__ __forceinline__ double over_batch(const PlaneArguments<T>& a, const Team& team, int k) {
  double sum = 0;
  if (team.active)
    for (int64_t b = threadIdx.x % 32; b < a.maps.batch; b += 32)
      sum += a.partial[(team.channel * a.maps.batch + b) * backward_sums + k];
  return warp_sum(sum);
}

template <class T>
__global__ void __launch_bounds__(threads, 2) apply_backward(const __grid_constant__ PlaneArguments<T> a) {
  using A = typename Sum<T>::type;
  const Team team(a);
  const Channel<A> channel(a, team.channel);
  double sums[3];
#pragma unroll
  for (int k = 0; k < 3; ++k) sums[k] = over_batch(a, team, k);
  if (!team.active) return;
  if (team.b == 0) {
    if (team.lane == 0) {
      put(a.gbeta, team.channel, sums[0]), put(a.ggamma, team.channel, sums[1]), put(a.gslope, team.channel, sums[2]);
    }
    for (int t = 0; t < 9; ++t) {
      const double total = over_batch(a, team, 3 + t);
      if (team.lane == 0) put(a.gkernel, team.channel * 9 + t, total);
    }
  }
  A w[9];
#pragma unroll
  for (int t = 0; t < 9; ++t) w[t] = get<A>(a.kernel, team.channel * 9 + t);
  const double count = static_cast<double>(a.maps.batch) * static_cast<double>(team.area);
  const A mean_gz = a.training ? A(sums[0] / count) : A(0), mean_gzx = a.training ? A(sums[1] / count) : A(0);
  const A scale = channel.gamma * channel.inverse;
  for_each_pixel<true>(
      a, team,
      [&](A x, const A(&g)[9]) {
        const A normal = (x - channel.mean) * channel.inverse, z = normal * channel.gamma + channel.beta;
        A gy = 0;
#pragma unroll
        for (int t = 0; t < 9; ++t) gy += w[t] * g[t];
        return scale * ((z > 0 ? gy : gy * channel.slope) - mean_gz - normal * mean_gzx);
      },
      [] {});
}

// Rows of whole packs, not planes alone.
template <class T>
void align_rows(PlaneArguments<T>& a) {
  for (int s = 0; s < a.maps.scales; ++s) a.aligned[s] = a.aligned[s] && a.maps.cols(s) % lane_pixels == 0;
}

}  // namespace

int64_t norm_depthwise_workspace(Type type, const Pyramid& maps) { return norm_act_workspace(type, maps); }

cudaError_t norm_depthwise(Type type, const Pyramid& maps, Pointers xs, const NormActParameters& parameters,
                           Vector running_mean, Vector running_var, Vector kernel, const double* moments, double eps,
                           bool training, Vector mean, Vector var, MutablePointers ys, Vector channel_means,
                           double* out_moments, void* workspace, cudaStream_t stream) {
  return for_type(type, [&](auto zero) {
    using T = decltype(zero);
    PlaneArguments<T> a = plane_arguments<T>(maps, xs, nullptr, ys);
    a.parameters = parameters, a.running_mean = running_mean, a.running_var = running_var, a.mean = mean, a.var = var;
    a.kernel = kernel, a.channel_means = channel_means, a.eps = eps, a.training = training, a.moments = out_moments;
    a.partial = moments != nullptr ? const_cast<double*>(moments) : static_cast<double*>(workspace);
    const int64_t blocks = a.blocks.first[maps.scales];
    if (training && moments == nullptr && maps.batch > 0) {
      const cudaError_t error = launch(measure<T>, blocks, threads, stream, a);
      if (error != cudaSuccess) return error;
    }
    align_rows(a);
    return launch(convolve<T>, blocks, threads, stream, a);
  });
}

int64_t norm_depthwise_backward_workspace(Type, const Pyramid& maps) {
  return maps.batch * maps.total() * backward_sums * static_cast<int64_t>(sizeof(double));
}

cudaError_t norm_depthwise_backward(Type type, const Pyramid& maps, Pointers gys, Pointers xs,
                                    const NormActParameters& parameters, Vector mean, Vector var, Vector kernel,
                                    double eps, bool training, MutablePointers gxs, Vector ggamma, Vector gbeta,
                                    Vector gslope, Vector gkernel, void* workspace, cudaStream_t stream) {
  return for_type(type, [&](auto zero) {
    using T = decltype(zero);
    PlaneArguments<T> a = plane_arguments<T>(maps, xs, gys, gxs);
    a.parameters = parameters, a.mean = mean, a.var = var, a.kernel = kernel, a.gkernel = gkernel;
    a.ggamma = ggamma, a.gbeta = gbeta, a.gslope = gslope, a.eps = eps, a.training = training;
    a.partial = static_cast<double*>(workspace);
    align_rows(a);
    const int64_t blocks = a.blocks.first[maps.scales];
    if (maps.batch > 0) {
      const cudaError_t error = launch(sum_backward<T>, blocks, threads, stream, a);
      if (error != cudaSuccess) return error;
    }
    return launch(apply_backward<T>, blocks, threads, stream, a);
  });
}

}  // namespace sodfast::cuda
