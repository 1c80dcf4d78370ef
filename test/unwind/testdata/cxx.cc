// Exceptions, std::map, virtual calls and strings, for ever.
#include <cstdio>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

struct Shape {
	virtual ~Shape() {}
	virtual std::string name(int depth) = 0;
};

struct Leaf : Shape {
	std::string name(int depth) override
	{
		if (depth % 7 == 0)
			throw std::runtime_error("leaf " + std::to_string(depth) + " of a kind that has no name at all");
		return std::string(40 + depth, 'x');
	}
};

struct Node : Shape {
	std::vector<std::unique_ptr<Shape>> parts;
	std::string name(int depth) override
	{
		std::string s;
		for (auto &p : parts) {
			try {
				s += p->name(depth + 1);
			} catch (const std::exception &e) {
				s += e.what();
			}
		}
		return s;
	}
};

static std::unique_ptr<Shape> make(int depth)
{
	if (depth == 0)
		return std::make_unique<Leaf>();
	auto n = std::make_unique<Node>();
	for (int i = 0; i < 3; i++)
		n->parts.push_back(make(depth - 1));
	return n;
}

int main()
{
	puts("ready");
	fflush(stdout);
	for (;;) {
		std::map<std::string, int> seen;
		for (int i = 0; i < 9; i++)
			try {
				seen[make(i % 4)->name(i)]++;
			} catch (const std::runtime_error &e) {
				seen[e.what()]--;
			}
	}
}
