// Functions with the names that a Rust and a D compiler give, so that no such compiler is needed.
#define NAMED(symbol) __asm__(symbol)
#define BODY { for (volatile int i = 0; i < x; i++) x += i * 3; return x; }

int legacy(int x) NAMED("_ZN5alloc3vec16Vec$LT$T$C$A$GT$4push17h1122334455667788E");
int legacy(int x) BODY
int v0(int x) NAMED("_RNvNtCsbmNqQUJIY6D_4core3fmt5write");
int v0(int x) BODY
int v0generic(int x) NAMED("_RINvNtC3std3mem8align_ofjE");
int v0generic(int x) BODY
int v0closure(int x) NAMED("_RNCNvC4bite3foo0s_0B3_");
int v0closure(int x) BODY
int legacy_trait(int x) NAMED("_ZN68_$LT$core..nonzero..NonZero$LT$T$GT$$u20$as$u20$core..ops..Deref$GT$5deref17h0123456789abcdefE");
int legacy_trait(int x) BODY

int calls(int x) { return legacy(x) + v0(x) + v0generic(x) + v0closure(x) + legacy_trait(x); }
