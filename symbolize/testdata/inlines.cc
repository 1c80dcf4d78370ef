// A program full of inlined calls: templates, lambdas, nested inlines, constructors, an anonymous namespace, local classes.
#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "shape.h"

namespace {

template <typename T> struct Ring {
    std::vector<T> items;
    size_t at = 0;
    explicit Ring(size_t n) : items(n) {}
    T &next() { return items[at++ % items.size()]; }
    template <typename F> void each(F f) {
        for (auto &item : items) f(item);
    }
};

inline int twice(int x) { return x + x; }
inline int fourfold(int x) { return twice(twice(x)); }
inline int sixteenfold(int x) { return fourfold(fourfold(x)); }

int local_class(int n) {
    struct Counter {
        int total = 0;
        __attribute__((noinline)) void add(int x) { total += sixteenfold(x) % 7; }
    } counter;
    for (int i = 0; i < n; i++) counter.add(i);
    return counter.total;
}

}  // namespace

namespace deep::er {

__attribute__((noinline)) std::string words(const std::vector<std::string> &in) {
    std::map<std::string, int> count;
    for (const auto &w : in) count[w]++;
    std::vector<std::pair<std::string, int>> sorted(count.begin(), count.end());
    std::sort(sorted.begin(), sorted.end(), [](const auto &a, const auto &b) { return a.second != b.second ? a.second > b.second : a.first < b.first; });
    std::string out;
    for (const auto &[word, n] : sorted) out += word + '=' + std::to_string(n) + ' ';
    return out;
}

__attribute__((noinline)) double shapes(size_t n) {
    std::vector<std::unique_ptr<Shape>> all;
    for (size_t i = 0; i < n; i++) {
        if (i % 3 == 0) all.push_back(std::make_unique<Square>(i));
        else all.push_back(std::make_unique<Circle>(i));
    }
    return std::accumulate(all.begin(), all.end(), 0.0, [](double sum, const auto &s) { return sum + s->area(); });
}

}  // namespace deep::er

int main(int argc, char **argv) {
    std::vector<std::string> args(argv, argv + argc);
    Ring<int> ring(argc + 17);
    ring.each([&](int &x) { x = sixteenfold(argc) + ring.next(); });
    std::map<int, std::function<int(int)>> table;
    for (int i = 0; i < 5; i++) table[i] = [i](int x) { return fourfold(x) + i; };
    int total = local_class(argc);
    for (auto &[k, f] : table) total += f(k);
    std::set<std::string> unique(args.begin(), args.end());
    for (const auto &a : unique) total += a.find("b") != a.npos;
    try {
        if (argc > 100) throw std::runtime_error(deep::er::words(args));
        total += (int)deep::er::shapes(argc);
    } catch (const std::exception &e) {
        total += (int)std::string(e.what()).size();
    }
    return total == 12345;
}
