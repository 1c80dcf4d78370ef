// Code with the shape of LuaJIT's lj_alloc_f, and with shapes that must not be taken for it. The functions are written
// in assembly, so that the compiler's mood does not decide the test.
#define FUNCTION(name, body) \
	__asm__(".text\n.p2align 4\n.type " #name ",@function\n" #name ":\n" body ".size " #name ",.-" #name "\n")
#define QUESTION(reg, label) "test %" reg ",%" reg "\nje " label "\n"
#define END "ret\n1: ret\n2: ret\n"

#if SHAPE == 2
FUNCTION(one, "push %rbx\nmov %rcx,%rbx\nsub $8,%rsp\ntest %rbx,%rbx\njne 3f\n1: ret\n3: " QUESTION("rsi", "2f") "ret\n2: ret\n");
#elif SHAPE == 3
FUNCTION(one, QUESTION("rsi", "1f") QUESTION("rcx", "2f") END);
#elif SHAPE == 4
FUNCTION(one, QUESTION("rcx", "1f") "test %rdx,%rdx\nje 2f\n" END);
#else
FUNCTION(one, QUESTION("rcx", "1f") QUESTION("rsi", "2f") END);
#endif
#if SHAPE == 5
FUNCTION(two, QUESTION("rcx", "1f") QUESTION("rsi", "2f") "nop\n" END);
#define TWO "lea two(%rip),%rax\n"
#else
#define TWO ""
#endif

__asm__(".globl lua_newstate\n.type lua_newstate,@function\nlua_newstate:\ncmp $0x4d50,%rdi\nlea one(%rip),%rdi\n" TWO
	"ret\n.size lua_newstate,.-lua_newstate\n");
#ifndef PLAIN_LUA
int luaJIT_setmode(void) { return 0; }
#endif
