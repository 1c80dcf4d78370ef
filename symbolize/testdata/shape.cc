#include "shape.h"

#include <cmath>
#include <vector>

static std::vector<double> seen;

static inline double squared(double x) { return x * x; }

Circle::Circle(double r) : radius(r) { seen.push_back(squared(r)); }
Circle::~Circle() { seen.erase(seen.begin()); }
double Circle::area() const {
    auto scaled = [this](double factor) { return squared(radius) * factor; };
    return scaled(M_PI) + (seen.empty() ? 0 : std::sqrt(seen.front()));
}
