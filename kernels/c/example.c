/* DRKL of two rows of logits and its gradient, on the first GPU: what a trainer in C does once per step. */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

#include "fusedkd.h"

#define CUDA(call) check((call) != 0, #call, "the driver refused")
#define DRIVER(name, ...) int (*name)(__VA_ARGS__) = (int (*)(__VA_ARGS__))dlsym(libcuda, #name)
enum { N = 2, V = 64 };

static void check(int failed, const char *what, const char *why) {
    if (!failed) return;
    fprintf(stderr, "%s: %s\n", what, why);
    exit(1);
}

int main(void) {
    void *libcuda = dlopen("libcuda.so.1", RTLD_NOW);
    check(!libcuda, "libcuda.so.1", fusedkd_status_string(FUSEDKD_NO_DRIVER));
    DRIVER(cuInit, unsigned);
    DRIVER(cuDevicePrimaryCtxRetain, void **, int);
    DRIVER(cuCtxSetCurrent, void *);
    DRIVER(cuMemAlloc_v2, uint64_t *, size_t);
    DRIVER(cuMemcpyHtoD_v2, uint64_t, const void *, size_t);
    DRIVER(cuMemcpyDtoH_v2, void *, uint64_t, size_t);

    void *context;
    CUDA(cuInit(0));
    CUDA(cuDevicePrimaryCtxRetain(&context, 0));
    CUDA(cuCtxSetCurrent(context));

    float student[N][V], teacher[N][V], grad[N][V], loss[N];
    int64_t labels[N] = {3, 17};
    for (int i = 0; i < N * V; i++) student[0][i] = (float)(i % 7), teacher[0][i] = (float)(i % 5);

    uint64_t s, t, y, l, g, w; /* on the device */
    CUDA(cuMemAlloc_v2(&s, sizeof student));
    CUDA(cuMemAlloc_v2(&t, sizeof teacher));
    CUDA(cuMemAlloc_v2(&y, sizeof labels));
    CUDA(cuMemAlloc_v2(&l, sizeof loss));
    CUDA(cuMemAlloc_v2(&g, sizeof grad));
    CUDA(cuMemcpyHtoD_v2(s, student, sizeof student));
    CUDA(cuMemcpyHtoD_v2(t, teacher, sizeof teacher));
    CUDA(cuMemcpyHtoD_v2(y, labels, sizeof labels));

    fusedkd_rows_args args;
    fusedkd_rows_defaults(&args, FUSEDKD_DIVERGENCE_DRKL); /* gamma = 0.5 */
    args.rows = N, args.vocab_size = V;
    args.student = (void *)s, args.teacher = (void *)t, args.labels = (void *)y;
    args.loss = (void *)l, args.grad = (void *)g;
    fusedkd_status status = fusedkd_rows_workspace(&args, &args.workspace_bytes);
    check(status, "fusedkd_rows_workspace", fusedkd_status_string(status));
    CUDA(cuMemAlloc_v2(&w, args.workspace_bytes));
    args.workspace = (void *)w;
    status = fusedkd_rows(&args, NULL);
    check(status, "fusedkd_rows", fusedkd_status_string(status));

    CUDA(cuMemcpyDtoH_v2(loss, l, sizeof loss));
    CUDA(cuMemcpyDtoH_v2(grad, g, sizeof grad));
    for (int n = 0; n < N; n++)
        printf("row %d: DRKL %.6f nats, gradient at the label %+.6f\n", n, loss[n], grad[n][labels[n]]);
    return 0;
}
