/* The calls of CUDA's runtime that verify.py makes, on the host's memory. The capability is compiled in. */
#include <stdlib.h>
#include <string.h>

#ifndef CAPABILITY
#define CAPABILITY 86
#endif

int cudaMalloc(void **pointer, size_t size) { return (*pointer = malloc(size)) ? 0 : 2; }
int cudaFree(void *pointer) { free(pointer); return 0; }
int cudaMemcpy(void *to, const void *from, size_t size, int kind) {
    if (kind != 1 && kind != 2) return 21;
    memcpy(to, from, size);
    return 0;
}
int cudaDeviceSynchronize(void) { return 0; }
const char *cudaGetErrorString(int status) { return status == 2 ? "out of memory" : "some error"; }
int cudaDeviceGetAttribute(int *value, int attribute, int device) {
    if (device) return 101;
    *value = attribute == 75 ? CAPABILITY / 10 : CAPABILITY % 10;
    return 0;
}
