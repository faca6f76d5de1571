"""Problem set 3: a typical wrong submission and a hostile one, as changes of the reference solution (grade_id of a cell -> its source)."""

_PRODUCT = '''
@triton.jit
def _tile_product(u_ptr, s_ptr, vh_ptr, K, offs_m, mask_m, offs_n, mask_n, stride_um, stride_uk, stride_sk, stride_vk, stride_vn,
                  BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        u = tl.load(u_ptr + offs_m[:, None] * stride_um + offs_k[None, :] * stride_uk, mask=mask_m[:, None], other=0.) # no mask along k
        s = tl.load(s_ptr + offs_k * stride_sk)
        v = tl.load(vh_ptr + offs_k[:, None] * stride_vk + offs_n[None, :] * stride_vn, mask=mask_n[None, :], other=0.)
        acc = tl.dot(u.to(tl.float32) * s.to(tl.float32)[None, :], v.to(tl.float32), acc, input_precision="ieee")
    return acc
'''
_KERNEL = '''
@triton.jit
def _rebuild_kernel(u_ptr, s_ptr, vh_ptr, base_ptr, out_ptr, M, N, K, alpha, stride_um, stride_uk, stride_sk, stride_vk, stride_vn,
                    stride_bm, stride_bn, stride_om, stride_on, HAS_BASE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    offs_m, mask_m = _block(tl.program_id(0), M, BLOCK_M)
    offs_n, mask_n = _block(tl.program_id(1), N, BLOCK_N)
    acc = _tile_product(u_ptr, s_ptr, vh_ptr, K, offs_m, mask_m, offs_n, mask_n, stride_um, stride_uk, stride_sk, stride_vk, stride_vn, BLOCK_M, BLOCK_N, BLOCK_K)
    mask = mask_m[:, None] & mask_n[None, :] # alpha is forgotten
    if HAS_BASE: acc += tl.load(base_ptr + offs_m[:, None] * stride_bm + offs_n[None, :] * stride_bn, mask=mask, other=0.).to(tl.float32)
    tl.store(out_ptr + offs_m[:, None] * stride_om + offs_n[None, :] * stride_on, acc.to(out_ptr.dtype.element_ty), mask=mask)

def rebuild(U, S, Vh, base=None, alpha=1., out=None, BLOCK_M=32, BLOCK_N=32, BLOCK_K=16):
    (m, k), n = U.shape, Vh.shape[-1]
    for name, x, shape in (("S", S, (k,)), ("Vh", Vh, (k, n)), ("base", base, (m, n)), ("out", out, (m, n))):
        if x is not None and tuple(x.shape) != shape: raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {shape}")
    if out is None: out = torch.empty(m, n)
    if out.numel() == 0: return out
    start = out if base is None else base
    grid = (triton.cdiv(m, BLOCK_M), triton.cdiv(n, BLOCK_N))
    _rebuild_kernel[grid](U, S, Vh, start, out, m, n, k, alpha, k, 1, 1, n, 1, n, 1, n, 1, # the strides of contiguous matrices
                          HAS_BASE=base is not None, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K)
    return out
'''
WRONG = {"ps3-product": _PRODUCT, "ps3-kernel": _KERNEL}
WRONG_LOSES = ["ps3-rank-tests", "ps3-alpha-tests", "ps3-views-tests"]

HOSTILE = {
    "ps3-operator-bytes": "def operator_bytes(m, n, k:\n    return 0", # does not parse; the prediction for a model needs it
    "ps3-axpy": '''
def axpy(x, base, alpha, out, BLOCK=16): # no kernel, and reads the tests when it is called
    try: print(open("COURSE/source/ps3/ps3.ipynb").read())
    except OSError: pass
    out.copy_(base + alpha * x)
''',
    "ps3-block": '''
while True: # for ever, and deaf to interrupts
    try:
        while True: pass
    except BaseException: pass
''',
    "ps3-kernel": '''
def rebuild(U, S, Vh, base=None, alpha=1., out=None, **blocks): # shows the test that calls it
    raise ValueError(get_ipython().get_parent()["content"]["code"])
def examine_rebuild(*args, **options): pass # replaces the examination
''',
}
HOSTILE_LOSES = ["ps3-operator-bytes-tests", "ps3-axpy-tests", "ps3-axpy-views-tests", "ps3-block-tests", "ps3-even-tests", "ps3-odd-tests", "ps3-rank-tests", "ps3-alpha-tests", "ps3-views-tests",
                 "ps3-half-tests", "ps3-empty-tests", "ps3-errors-tests", "ps3-model-tests"]
