/* Every case of a file that tests/vectors.py wrote, on the GPU: contiguous and strided rows, with and without the
   gradient, statistics and the library's own weights; each within its relative L2 bound of the float64 truth. */
#include "fusedkd.h"

#include <dlfcn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SKIPPED = 77 };

static int (*cuMemAlloc_v2)(uint64_t *, size_t);
static int (*cuMemFree_v2)(uint64_t);
static int (*cuMemcpyHtoD_v2)(uint64_t, const void *, size_t);
static int (*cuMemcpyDtoH_v2)(void *, uint64_t, size_t);
static int (*cuMemsetD8_v2)(uint64_t, unsigned char, size_t);

static void find(void *library, const char *name, void *into) {
    void *found = dlsym(library, name);
    if (!found) exit((fprintf(stderr, "libcuda has no %s\n", name), 1));
    memcpy(into, &found, sizeof found);
}

static void must(int result, const char *what) {
    if (result) exit((fprintf(stderr, "%s: CUresult %d\n", what, result), 1));
}

/* 0 where there is a GPU, whose context is then current */
static int start(void) {
    int (*init)(unsigned), (*count)(int *), (*retain)(void **, int), (*set)(void *), devices = 0;
    void *context, *library = dlopen("libcuda.so.1", RTLD_NOW);
    if (!library) return puts("skipped: there is no NVIDIA driver (libcuda.so.1)"), SKIPPED;
    find(library, "cuInit", &init);
    find(library, "cuDeviceGetCount", &count);
    find(library, "cuDevicePrimaryCtxRetain", &retain);
    find(library, "cuCtxSetCurrent", &set);
    find(library, "cuMemAlloc_v2", &cuMemAlloc_v2);
    find(library, "cuMemFree_v2", &cuMemFree_v2);
    find(library, "cuMemcpyHtoD_v2", &cuMemcpyHtoD_v2);
    find(library, "cuMemcpyDtoH_v2", &cuMemcpyDtoH_v2);
    find(library, "cuMemsetD8_v2", &cuMemsetD8_v2);
    if (init(0) || count(&devices) || !devices) return puts("skipped: the driver sees no GPU"), SKIPPED;
    must(retain(&context, 0), "cuDevicePrimaryCtxRetain");
    must(set(context), "cuCtxSetCurrent");
    return 0;
}

static double number(const void *at, int64_t i, fusedkd_dtype dtype) {
    uint32_t bits;
    float x;
    if (dtype == FUSEDKD_FLOAT32) return ((const float *)at)[i];
    bits = ((const uint16_t *)at)[i];
    if (dtype == FUSEDKD_BFLOAT16) {
        bits <<= 16;
        memcpy(&x, &bits, sizeof x);
        return x;
    }
    int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    double value = exponent == 31 ? (mantissa ? NAN : INFINITY)
                   : exponent     ? ldexp(1024 + mantissa, exponent - 25)
                                  : ldexp(mantissa, -24);
    return bits >> 15 ? -value : value;
}

struct buffer {
    uint64_t address;
    size_t bytes;
};

static struct buffer make(size_t bytes) { /* NaN, whatever the dtype */
    struct buffer made = {0, bytes ? bytes : 1};
    must(cuMemAlloc_v2(&made.address, made.bytes), "cuMemAlloc");
    must(cuMemsetD8_v2(made.address, 0xff, made.bytes), "cuMemsetD8");
    return made;
}

static struct buffer upload(const void *from, size_t bytes) {
    struct buffer made = make(bytes);
    must(cuMemcpyHtoD_v2(made.address, from, bytes), "cuMemcpyHtoD");
    return made;
}

static void *take(FILE *file, size_t bytes) {
    void *memory = malloc(bytes);
    if (!memory || fread(memory, 1, bytes, file) != bytes) exit((fprintf(stderr, "the file of vectors ends early\n"), 1));
    return memory;
}

/* The same rows, `apart` columns for each and some between rows. */
static void *spread(const void *rows, int n, int columns, int apart, size_t stride, size_t element) {
    char *wide = calloc((size_t)n * stride, element);
    if (!wide) exit(1);
    for (int i = 0; i < n; i++)
        for (int j = 0; j < columns; j++)
            memcpy(wide + element * (i * stride + (size_t)j * apart), (const char *)rows + element * ((size_t)i * columns + j),
                   element);
    return wide;
}

static double distance(const void *ours, fusedkd_dtype dtype, const double *truth, int n, int columns, size_t stride,
                       int apart) {
    double gap = 0, size = 0;
    for (int i = 0; i < n; i++)
        for (int j = 0; j < columns; j++) {
            double x = number(ours, (int64_t)(i * stride + (size_t)j * apart), dtype), y = truth[(size_t)i * columns + j];
            gap += (x - y) * (x - y);
            size += y * y;
        }
    return sqrt(gap / size);
}

int main(int count, char **arguments) {
    int cases = 0, failures = 0, skipped = start();
    FILE *file = count == 2 ? fopen(arguments[1], "rb") : NULL;
    if (skipped) return skipped;
    if (!file) return fprintf(stderr, "usage: %s FILE, written by tests/vectors.py\n", arguments[0]), 1;
    for (struct {
             int32_t divergence, dtype, decoupled, rows, columns;
             double parameters[FUSEDKD_PARAMETERS], temperature, bound;
         } head;
         fread(&head.divergence, 4, 5, file) == 5;) {
        if (fread(head.parameters, 8, FUSEDKD_PARAMETERS + 2, file) != FUSEDKD_PARAMETERS + 2) return 1;
        fusedkd_dtype dtype = (fusedkd_dtype)head.dtype;
        size_t element = dtype == FUSEDKD_FLOAT32 ? 4 : 2, rows = (size_t)head.rows, size = rows * (size_t)head.columns;
        void *student = take(file, size * element), *teacher = take(file, size * element);
        void *labels = take(file, rows * 8), *weights = take(file, rows * 4);
        double *loss = take(file, rows * 8), *grad = take(file, size * 8);
        struct buffer y = upload(labels, rows * 8), w = upload(weights, rows * 4);
        for (int way = 0; way < 4; way++) { /* bit 0: strided; bit 1: the value alone, with statistics */
            int apart = way & 1 ? 2 : 1, value_alone = way >> 1;
            size_t stride = way & 1 ? 2 * (size_t)head.columns + 3 : (size_t)head.columns, room = rows * stride * element;
            void *wide_s = spread(student, head.rows, head.columns, apart, stride, element);
            void *wide_t = spread(teacher, head.rows, head.columns, apart, stride, element);
            struct buffer s = upload(wide_s, room), t = upload(wide_t, room), g = make(room), l = make(rows * 4);
            struct buffer stats = make(rows * 4 * FUSEDKD_STATS);
            fusedkd_rows_args args;
            must(fusedkd_rows_defaults(&args, (fusedkd_divergence)head.divergence), "fusedkd_rows_defaults");
            memcpy(args.parameters, head.parameters, sizeof args.parameters);
            args.dtype = dtype, args.decoupled = head.decoupled, args.rows = head.rows, args.vocab_size = head.columns;
            args.temperature = head.temperature, args.temperature_squared = 1;
            args.student = (void *)s.address, args.teacher = (void *)t.address;
            args.labels = (void *)y.address, args.weights = (void *)w.address, args.loss = (void *)l.address;
            args.student_row_stride = args.teacher_row_stride = args.grad_row_stride = (int64_t)stride;
            args.student_column_stride = args.teacher_column_stride = args.grad_column_stride = apart;
            args.grad = value_alone ? NULL : (void *)g.address;
            args.stats = value_alone ? (void *)stats.address : NULL;
            must(fusedkd_rows_workspace(&args, &args.workspace_bytes), "fusedkd_rows_workspace");
            struct buffer work = make(args.workspace_bytes);
            args.workspace = (void *)work.address;
            fusedkd_status status = fusedkd_rows(&args, NULL);
            if (status) return fprintf(stderr, "%s (%d)\n", fusedkd_status_string(status), fusedkd_driver_error()), 1;

            float *ours = malloc(rows * 4);
            void *slope = malloc(room);
            if (!ours || !slope) return 1;
            must(cuMemcpyDtoH_v2(ours, l.address, rows * 4), "the kernel");
            must(cuMemcpyDtoH_v2(slope, g.address, room), "cuMemcpyDtoH");
            double off = distance(ours, FUSEDKD_FLOAT32, loss, 1, head.rows, 0, 1);
            double off_grad = value_alone ? 0 : distance(slope, dtype, grad, head.rows, head.columns, stride, apart);
            if (!(off <= 2e-5 && off_grad <= head.bound)) { /* NaN fails, too */
                fprintf(stderr, "%s%s, dtype %d, %d columns, way %d: value off by %.2e, gradient by %.2e (allowed %.2e)\n",
                        head.decoupled ? "decoupled " : "", fusedkd_divergence_name(args.divergence), head.dtype,
                        head.columns, way, off, off_grad, head.bound);
                failures++;
            }
            cases++;
            struct buffer used[] = {s, t, g, l, stats, work};
            for (size_t i = 0; i < sizeof used / sizeof *used; i++) must(cuMemFree_v2(used[i].address), "cuMemFree");
            free(wide_s), free(wide_t), free(ours), free(slope);
        }
        must(cuMemFree_v2(y.address), "cuMemFree");
        must(cuMemFree_v2(w.address), "cuMemFree");
        free(student), free(teacher), free(labels), free(weights), free(loss), free(grad);
    }
    printf("%d of %d calls within their bounds\n", cases - failures, cases);
    return failures || !cases;
}
