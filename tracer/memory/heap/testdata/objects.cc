// Holds objects of classes that only their vtables name.
#include <cstdio>
#include <string>
#include <unistd.h>
#include <vector>

namespace shop {
struct Item {
	virtual ~Item() {}
	long price = 7;
};
template <typename T> struct Box : Item {
	T content{};
};
}
namespace {
struct Hidden {
	virtual void f() {}
	long a = 1, b = 2;
};
}

static std::vector<void *> keep;

int main()
{
	for (int i = 0; i < 103; i++)
		keep.push_back(new shop::Item);
	for (int i = 0; i < 59; i++)
		keep.push_back(new shop::Box<double>);
	for (int i = 0; i < 31; i++)
		keep.push_back(new Hidden);
	for (int i = 0; i < 1009; i++) {
		char *p = (char *)malloc(200);
		sprintf(p, "{\"uid\":%d,\"token\":\"s3cr3t\",\"payload\":\"needle-%d\"}", i, i);
		keep.push_back(p);
	}
	puts("ready");
	fflush(stdout);
	for (;;)
		pause();
}
