/* Lets User-mode Linux 6.1 run on processors with AMX (Sapphire Rapids and later).
 *
 * The kernel sets a traced process's registers with PTRACE_SETREGSET, NT_X86_XSTATE, from a buffer of a fixed 2696 bytes:
 * all there was before AMX. The machine's kernel only takes the whole of its own size, which AMX makes 11008, and refuses
 * the rest with EFAULT; User-mode Linux then panics with its first process. This library, preloaded, pads the buffer: what
 * is added belongs to features whose bits in the header are clear, so the machine's kernel reads none of it.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>

enum { GETREGSET = 0x4204, SETREGSET = 0x4205 };

static char padded[1 << 16];
static size_t whole; /* bytes; the size of the machine's own register set, once known */

long ptrace(int request, pid_t pid, void *address, void *data)
{
    static long (*next)(int, ...);
    if (!next)
        next = (long (*)(int, ...))dlsym(RTLD_NEXT, "ptrace");

    if (request == SETREGSET && address == (void *)NT_X86_XSTATE) {
        const struct iovec *given = data;
        struct iovec full = {padded, sizeof padded};
        if (!whole && next(GETREGSET, pid, address, &full) == 0) {
            whole = full.iov_len;
            memset(padded, 0, sizeof padded);
        }
        if (given->iov_len < whole) {
            memcpy(padded, given->iov_base, given->iov_len);
            full.iov_len = whole;
            return next(request, pid, address, &full);
        }
    }
    return next(request, pid, address, data);
}
