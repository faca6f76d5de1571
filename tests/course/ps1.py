"""Problem set 1: a typical wrong submission and a hostile one, as changes of the reference solution (grade_id of a cell -> its source)."""

WRONG = {
    "ps1-bytes": '''
def factor_numbers(m, n, k): return k * (m + n) # forgets the singular values

def archive_bytes(archive):
    return sum(x.nbytes for e in archive.values() for x in (e if isinstance(e, tuple) else (e,)))
''',
    "ps1-rebuild": '''
def rebuild(pretrained, archive, alpha=1.0):
    result = {}
    for name, start in pretrained.items():
        e = archive.get(name)
        if e is None: result[name] = start.clone(); continue
        result[name] = (start + alpha * (e[0].float() * e[1] @ e[2].float()) if isinstance(e, tuple) else start + e).to(start.dtype) # alpha for matrices only
    return result
''',
}
WRONG_LOSES = ["ps1-bytes-tests", "ps1-rebuild-tests"]

HOSTILE = {
    "ps1-apply": "def my_apply(pretrained, tau, alpha=1.0)\n    return pretrained", # does not parse
    "ps1-truncate": '''
while True: # for ever, and deaf to interrupts
    try:
        while True: pass
    except BaseException: pass
''',
    "ps1-compress": '''
def compress_vector(tau, k):
    return {n: tuple(truncated_svd(d, min(k, *d.shape))) if d.ndim == 2 else d for n, d in tau.items()}
import glob, os
for path in ["ps1.ipynb", "COURSE/source/ps1/ps1.ipynb", "COURSE/autograded/hostile/ps1/ps1.ipynb", "COURSE/gradebook.db"]: # reads the tests, and hides that it was refused
    try: print(open(path, errors="replace").read())
    except OSError: pass
import ctypes
def by_the_c_library(path):
    ctypes.pythonapi.fopen.restype = ctypes.c_void_p
    text, file = ctypes.create_string_buffer(100_000), ctypes.c_void_p(ctypes.pythonapi.fopen(path, b"r"))
    ctypes.pythonapi.fread(text, 1, 100_000, file)
    return text.value.decode()
def by_torch(path): return bytes(torch.from_file(path.decode(), size=os.stat(path).st_size, dtype=torch.uint8).tolist()).decode()
def by_storage(path): return bytes(torch.UntypedStorage.from_file(path.decode(), False, os.stat(path).st_size).tolist()).decode()
for read in (by_the_c_library, by_torch, by_storage): # below Python, where no file is seen to be opened
    try: print("read below Python:", read(b"COURSE/source/ps1/ps1.ipynb"))
    except OSError: pass
''',
    "ps1-bytes": '''
import tsv_nb.course.grading
def _nothing(*args, **kwargs): pass
check_equal = tsv_nb.course.grading.check_equal = _nothing # replaces the check
def factor_numbers(m, n, k): return 0
def archive_bytes(archive): return 0
''',
    "ps1-rank": "import os\nos._exit(0)", # ends the process
    "ps1-rebuild": '''
def rebuild(pretrained, archive, alpha=1.0): # shows the test that calls it
    raise ValueError(get_ipython().get_parent()["content"]["code"])
''',
    "ps1-half": '''
def to_half(archive):
    keep = []
    while True: keep.append(torch.ones(10**7)) # eats the memory
''',
}
HOSTILE_LOSES = ["ps1-apply-tests", "ps1-truncate-tests", "ps1-compress-tests", "ps1-bytes-tests", "ps1-rank-tests", "ps1-rebuild-tests", "ps1-half-tests"]
