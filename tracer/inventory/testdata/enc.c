// A library in two builds: -DVERSION decides.
#define TEXT(x) #x
#define STRING(x) TEXT(x)
const char enc_version[] = "libenc " STRING(VERSION) " (test)";
int enc_value(void) { return sizeof enc_version; }
