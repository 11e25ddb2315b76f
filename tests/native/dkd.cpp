// The weight and the loss of dynamic distillation against their definitions in double precision.
#include <tuple>

#include "check.h"

namespace sodfast::test {
namespace {

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
double softplus(double x) { return std::fmax(x, 0) + std::log1p(std::exp(-std::abs(x))); }

struct Case {
  DkdShape shape;
  std::vector<Values> arguments;  // student, teacher, truth, theta, gradient of the loss
  DkdRule rule;
  double temperature, kl_factor;
};

Case random_case() {
  Case c;
  c.shape = {pick(0, 9) == 0 ? 0 : pick(1, 3), pick(0, 2) == 0 ? pick(1, 3000) : pick(1, 80)};
  c.temperature = static_cast<double>(pick(1, 10)), c.kl_factor = static_cast<double>(pick(0, 25));
  c.rule = {static_cast<double>(pick(0, 4)) / 4, pick(0, 3) == 0 ? 1.0 : -1.0, 0.01};  // 1: no α is above
  const int64_t n = c.shape.images * c.shape.pixels;
  const double scale = pick(0, 4) == 0 ? 1e4 : static_cast<double>(pick(1, 20));
  c.arguments = {random_values(n, scale), random_values(n, scale), random_values(n), random_values(c.shape.images),
                 random_values(c.shape.images)};
  for (size_t i : {2, 3})  // truth and theta are in 0–1
    for (double& x : c.arguments[i]) x = static_cast<double>(static_cast<float>(sigmoid(4 * x)));
  return c;
}

// θ, α and β, the loss, and the gradient to the student times the pixels.
std::vector<Values> literal(const Case& c) {
  const auto& [student, teacher, truth, theta, g] =
      std::tie(c.arguments[0], c.arguments[1], c.arguments[2], c.arguments[3], c.arguments[4]);
  Values thetas, alphas, betas, losses, gradient;
  const size_t pixels = static_cast<size_t>(c.shape.pixels);
  for (size_t image = 0; image < theta.size(); ++image) {
    double sum[4] = {}, loss = 0;
    for (size_t i = image * pixels; i < (image + 1) * pixels; ++i) {
      const double maps[2] = {sigmoid(student[i]), sigmoid(teacher[i])};
      for (int k = 0; k < 2; ++k) {
        sum[2 * k] += maps[k] * truth[i];
        sum[2 * k + 1] += maps[k] * (1 - truth[i]) + (1 - maps[k]) * truth[i];
      }
      const double z = student[i] / c.temperature, t = teacher[i] / c.temperature, p = sigmoid(t);
      const double kl = p * (softplus(-z) - softplus(-t)) + (1 - p) * (softplus(z) - softplus(t));
      const double ce = truth[i] * softplus(-student[i]) + (1 - truth[i]) * softplus(student[i]);
      loss += theta[image] * c.kl_factor * kl + (1 - theta[image]) * ce;
      gradient.push_back(g[image] * (theta[image] * c.kl_factor / c.temperature * (sigmoid(z) - p) +
                                     (1 - theta[image]) * (maps[0] - truth[i])));
    }
    const double alpha = sum[2] / (sum[2] + sum[3]), beta = sum[1] / (sum[0] + sum[1]);
    const double theta = std::tanh(std::pow(alpha, c.rule.p) * std::pow(beta, 1 - c.rule.p));
    thetas.push_back(c.rule.threshold < 0 ? theta : c.rule.epsilon);
    alphas.push_back(alpha), betas.push_back(beta);
    losses.push_back(loss / static_cast<double>(pixels));
  }
  return {thetas, alphas, betas, losses, gradient};
}

template <class T>
void check(const std::string& name, const Case& c, const std::vector<Values>& expected, double tolerance) {
  Maps<T> in(c.arguments);
  const size_t n = c.arguments[0].size(), images = c.arguments[3].size();
  Maps<T> out({Values(images, NAN), Values(images, NAN), Values(images, NAN), Values(images, NAN), Values(n, NAN),
               Values(images, NAN), Values(n, NAN)});
  const Kernels<T>& k = kernels<T>();
  k.dkd_theta(c.shape, in[0], in[1], in[2], c.rule, out[0], out[1], out[2], backwards());
  k.dkd_loss(c.shape, in[0], in[1], in[2], in[3], c.temperature, c.kl_factor, out[3], out[4], backwards());
  k.dkd_loss(c.shape, in[0], in[1], in[2], in[3], c.temperature, c.kl_factor, out[5], nullptr, backwards());
  k.dkd_loss_backward(c.shape, in[4], out[4], out[6], backwards());
  std::vector<Values> found = out.values();
  for (double& x : found[6]) x *= static_cast<double>(c.shape.pixels);
  expect_equal(name, {found[0], found[1], found[2], found[3], found[6]}, expected, tolerance);
  expect_equal(name + " without gradient", {found[5]}, {found[3]}, 0);
}

}  // namespace

void test_dkd(int cases) {
  for_each_case("dkd", cases, [](const std::string& name) {
    const Case c = random_case();
    const std::vector<Values> expected = literal(c);
    check<double>(name + " double", c, expected, 1e-12);
    check<float>(name + " float", c, expected, 2e-6);
  });
}

}  // namespace sodfast::test
