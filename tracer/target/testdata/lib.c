#include <stdlib.h>
/* A library whose constructor allocates before main. */
void *lib_block;
__attribute__((constructor)) static void early(void) { lib_block = malloc(1009); }
