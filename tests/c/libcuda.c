/* A driver without a GPU, for tests/test_clibrary.py: device memory is the host's, and a launch is written down. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

struct launch {
    const void *cubin;
    char entry[64];
    unsigned grid[3], block[3], shared;
    void *stream;
    void *arguments[40];
};

static int device_of_context[4] = {0, 1, 2, 3};
static __thread void *current;
int stub_capability[4][2] = {{9, 0}, {8, 9}, {7, 5}, {10, 0}};
int stub_fails, stub_loads, stub_launches;
unsigned long long stub_id = 1;
void (*stub_launched)(const struct launch *);

int cuInit(unsigned flags) { return flags != 0; }
int cuCtxGetCurrent(void **context) { return *context = current, 0; }
int cuCtxGetId(void *context, unsigned long long *id) { return *id = stub_id, context == NULL; }
int cuCtxGetDevice(int *device) { return *device = *(int *)current, 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    return *value = stub_capability[device][attribute == 76], 0;
}
int cuModuleLoadData(void **module, const void *image) {
    __sync_fetch_and_add(&stub_loads, 1);
    return *module = (void *)image, stub_fails;
}
static struct launch functions[256];
static int function_count;
int cuModuleGetFunction(void **function, void *module, const char *name) { /* called under the library's lock */
    struct launch *made = &functions[function_count++ % 256];
    made->cubin = module;
    strncpy(made->entry, name, sizeof made->entry - 1);
    return *function = made, 0;
}
int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *stream, void **arguments, void **extra) {
    struct launch made = *(struct launch *)function;
    unsigned grid[3] = {gx, gy, gz}, block[3] = {bx, by, bz};
    memcpy(made.grid, grid, sizeof grid);
    memcpy(made.block, block, sizeof block);
    memcpy(made.arguments, arguments, sizeof made.arguments);
    made.shared = shared;
    made.stream = stream;
    __sync_fetch_and_add(&stub_launches, 1);
    if (stub_launched) stub_launched(&made);
    return extra != NULL;
}
int cuMemsetD32Async(uint64_t address, unsigned value, size_t count, void *stream) {
    (void)stream;
    for (size_t i = 0; i < count; i++) ((unsigned *)(uintptr_t)address)[i] = value;
    return 0;
}
void stub_use(int device) { current = device < 0 ? NULL : &device_of_context[device]; }
