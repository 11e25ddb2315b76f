// Dynamic weight decay, alone and with Adam's step, against its definition in double precision.
#include "check.h"

namespace sodfast::test {
namespace {

struct Layer {
  int64_t channels, samples;
  Values means, factors, weight, grad, exp_avg, exp_avg_sq;  // factors: empty for none
};

struct Case {
  std::vector<Layer> layers;
  double lambda = 3 * std::abs(normal());
  bool absolute = pick(0, 1) == 1, decoupled = pick(0, 1) == 1;
  AdamStep adam{1e-2, 0.9, 0.99, 1e-8, pick(1, 50)};
  Case() {
    const bool factors = pick(0, 1) == 1;
    for (int64_t i = pick(0, 5); i > 0; --i) {
      Layer l;
      l.channels = pick(0, 9) == 0 ? 0 : pick(0, 3) == 0 ? pick(1, 300) : pick(1, 9);
      l.samples = pick(1, 6);
      l.means = random_values(l.samples * l.channels, 0.1), l.weight = random_values(l.channels);
      l.grad = random_values(l.channels), l.exp_avg = random_values(l.channels, 0.1);
      l.exp_avg_sq = random_values(l.channels, 0.1);
      for (double& v : l.exp_avg_sq) v = std::abs(v);
      if (factors) l.factors = random_values(l.channels);
      layers.push_back(l);
    }
  }
};

double strength(const Case& c, const Layer& l, int64_t k) {
  double sum = 0;
  for (int64_t b = 0; b < l.samples; ++b) {
    const double m = l.means[static_cast<size_t>(b * l.channels + k)];
    sum += c.absolute ? std::abs(m) : m;
  }
  const double factor = l.factors.empty() ? 1 : l.factors[static_cast<size_t>(k)];
  return c.lambda * factor * sum / static_cast<double>(l.samples);
}

// The layer after decay alone (adam false) or with Adam's step.
Layer literal(const Case& c, Layer l, bool adam) {
  for (int64_t i = 0; i < l.channels; ++i) {
    const size_t k = static_cast<size_t>(i);
    const double decayed = strength(c, l, i) * l.weight[k];
    double g = l.grad[k];
    if (c.decoupled) {
      l.weight[k] -= decayed;
    } else {
      g += decayed;
      if (!adam) l.grad[k] = g;
    }
    if (!adam) continue;
    l.exp_avg[k] = c.adam.beta1 * l.exp_avg[k] + (1 - c.adam.beta1) * g;
    l.exp_avg_sq[k] = c.adam.beta2 * l.exp_avg_sq[k] + (1 - c.adam.beta2) * g * g;
    const double step = static_cast<double>(c.adam.step);
    const double m = l.exp_avg[k] / (1 - std::pow(c.adam.beta1, step)),
                 v = l.exp_avg_sq[k] / (1 - std::pow(c.adam.beta2, step));
    l.weight[k] -= c.adam.lr * m / (std::sqrt(v) + c.adam.eps);
  }
  return l;
}

template <class T>
void run(const std::string& name, const Case& c, bool adam, double tolerance) {
  std::vector<Values> flat, expected;
  for (const Layer& l : c.layers) {
    for (const Values* v : {&l.means, &l.factors, &l.weight, &l.grad, &l.exp_avg, &l.exp_avg_sq}) flat.push_back(*v);
    const Layer after = literal(c, l, adam);
    for (const Values* v :
         {&after.means, &after.factors, &after.weight, &after.grad, &after.exp_avg, &after.exp_avg_sq})
      expected.push_back(*v);
  }
  Maps<T> data(flat);
  std::vector<DecayLayer<T>> layers;
  for (size_t i = 0; i < c.layers.size(); ++i) {
    const Layer& l = c.layers[i];
    DecayLayer<T> d;
    d.channels = l.channels, d.samples = l.samples, d.means = data[6 * i], d.weight = data[6 * i + 2];
    if (!l.factors.empty()) d.factors = data[6 * i + 1];
    if (adam || !c.decoupled) d.grad = data[6 * i + 3];
    d.exp_avg = data[6 * i + 4], d.exp_avg_sq = data[6 * i + 5];
    layers.push_back(d);
  }
  const int64_t number = static_cast<int64_t>(layers.size());
  if (adam) {
    kernels<T>().adam_decay(layers.data(), number, c.lambda, c.absolute, c.decoupled, c.adam);
  } else {
    kernels<T>().decay(layers.data(), number, c.lambda, c.absolute);
  }
  expect_equal(name, data.values(), expected, tolerance);
}

}  // namespace

void test_decay(int cases) {
  for_each_case("decay", cases, [](const std::string& name) {
    const Case c;
    for (const bool adam : {false, true}) {
      const std::string which = name + (adam ? " adam" : " alone");
      run<double>(which + " double", c, adam, 1e-12);
      run<float>(which + " float", c, adam, 1e-5);
    }
  });
}

}  // namespace sodfast::test
