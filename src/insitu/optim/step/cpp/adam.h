// Adam's moments of one number.
#pragma once
#include "numbers.h"

namespace {

struct Adam {
  float beta1, weight1, beta2, weight2, correction1, scale2, eps;  // weight: 1 - beta; scale2: 1 / the correction of V
  explicit Adam(const float* n)
      : beta1(n[0]), weight1(n[1]), beta2(n[2]), weight2(n[3]), correction1(n[4]), scale2(n[5]), eps(n[6]) {}
};

inline float direction(const Adam& a, float r, float& m, float& v) {
  m = m * a.beta1 + r * a.weight1;  // m + (r - m) weight would lose what is small beside m
  v = v * a.beta2 + r * r * a.weight2;
  return m / ((std::sqrt(v * a.scale2) + a.eps) * a.correction1);
}

}  // namespace
