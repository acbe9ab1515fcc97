"""Commands as processes of their own that start in milliseconds: forked from one process that has imported what they import.

A command of mmsn spends four seconds of processor time on importing torch and its compiler before it does anything, and the tests start over a hundred. A forked
one differs in this alone: it has its own id, session, signals, environment, folder, standard streams and exit code, and ends as an interpreter ends. How commands start
is tested where they are started in earnest (`conftest.run(…, fork=False)`, the launchers, the scripts of test_ends.py)."""
import gc, io, json, os, select, signal, socket, struct, subprocess, sys, threading, time
from pathlib import Path

FUNCTIONS = {'mmsn.evaluate': 'mmsn.evaluate.__main__'}       # `-m` name -> module whose `main` it runs


class Command:
    "A command that runs, with what the tests use of `subprocess.Popen`."
    def __init__(self, module, *words, stderr=subprocess.PIPE, cwd=None, env=None, before=''):     # `before`: code that runs in the process before the command
        self.args, self.returncode, self._kept = [module, *words], None, b''
        (out, out_end), (err, err_end), (self._status, status_end) = os.pipe(), os.pipe(), os.pipe()
        if stderr == subprocess.STDOUT: os.dup2(out_end, err_end)
        body = json.dumps(dict(module=module, words=[str(w) for w in words], cwd=str(cwd or os.getcwd()), env=dict(os.environ if env is None else env), before=before)).encode()
        server = _server()
        socket.send_fds(server, [struct.pack('!I', len(body))], [out_end, err_end, status_end])
        server.sendall(body)
        for end in (out_end, err_end, status_end): os.close(end)
        self.stdout, self.stderr = (io.open(end, encoding='utf-8', errors='replace') for end in (out, err))
        self.pid = int(self._line())

    def _line(self):
        while not self._kept.endswith(b'\n'):
            part = os.read(self._status, 1 << 10)
            assert part, 'the process that forks has ended'
            self._kept += part
        line, self._kept = self._kept.split(b'\n', 1)
        return line

    def poll(self):
        if self.returncode is None and select.select([self._status], [], [], 0)[0]:
            status = int(self._line())
            os.close(self._status)
            self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout=None):
        until = time.monotonic() + (timeout or 1e9)
        while self.poll() is None:
            if time.monotonic() > until: raise subprocess.TimeoutExpired(self.args, timeout)
            select.select([self._status], [], [], .05)
        return self.returncode

    def communicate(self, timeout=None):
        "(standard output, standard error), once both are closed and the command has ended."
        found = ['', '']
        def read(i, stream):
            with stream: found[i] = stream.read()
        readers = [threading.Thread(target=read, args=(i, s), daemon=True) for i, s in enumerate((self.stdout, self.stderr))]
        until = time.monotonic() + (timeout or 1e9)
        for r in readers: r.start()
        for r in readers: r.join(max(0, until - time.monotonic()))
        if any(r.is_alive() for r in readers): raise subprocess.TimeoutExpired(self.args, timeout)
        self.wait(timeout)
        return tuple(found)

    def send_signal(self, number):
        if self.poll() is None: os.kill(self.pid, number)

    def kill(self): self.send_signal(signal.SIGKILL)


_made = []

def _server():
    "The socket to the process that forks, which ends with this one."
    if not _made or _made[0] != os.getpid():
        ours, its = socket.socketpair()
        _made[:] = [os.getpid(), ours, subprocess.Popen([sys.executable, str(Path(__file__)), str(its.fileno())], pass_fds=[its.fileno()], stdout=subprocess.DEVNULL, start_new_session=True)]
        its.close()
        assert ours.recv(1) == b'1', 'the process that forks did not start'
    return _made[1]


def warm():
    "Import what the commands import; nothing of it may start a thread, which a fork would lose."
    import torch._dynamo
    import matplotlib.pyplot, mmsn.convert, mmsn.demo, mmsn.encode, mmsn.evaluate.__main__, mmsn.evaluate.evaluation, mmsn.loop, mmsn.prepare, mmsn.train, nbclient, nbconvert, sklearn.ensemble
    from mmsn.evaluate import report
    report.nbformat.v4
    gc.collect(), gc.freeze()                                 # or each process copies and collects what was imported when it ends
    names = {(t/'comm').read_text().strip() for t in Path('/proc/self/task').glob('*') if t.name != str(os.getpid())}
    assert names <= {'jemalloc_bg_thd'}, names                # pyarrow's allocator, which forks in an orderly way


def serve(connection):
    "Fork a process for each request; returns the request in it, None when the other end is closed."
    while True:
        head, fds, *_ = socket.recv_fds(connection, 4, 3)
        if not head: return None
        size, body = struct.unpack('!I', head)[0], b''
        while len(body) < size: body += connection.recv(size - len(body))
        if not os.fork():                                     # waits for the command, and tells how it ended
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            connection.close()
            if not (pid := os.fork()): return json.loads(body), fds
            os.close(fds[0]), os.close(fds[1])
            try:
                os.write(fds[2], b'%d\n' % pid)
                os.write(fds[2], b'%d\n' % os.waitpid(pid, 0)[1])
            except BrokenPipeError: pass                      # nobody waits for it any more
            os._exit(0)
        for fd in fds: os.close(fd)


def become(request, fds):
    "Turn the forked process into the one that was asked for; returns the function to run."
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDONLY)
    for fd, at in zip((nothing, *fds[:2]), range(3)): os.dup2(fd, at)
    os.closerange(3, 1 << 12)
    os.chdir(request['cwd'])
    os.environ.clear()
    os.environ.update(request['env'])
    time.tzset()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    module = FUNCTIONS.get(request['module'], request['module'])
    sys.stdout.reconfigure(line_buffering='PYTHONUNBUFFERED' in os.environ)
    sys.argv[:] = [module, *request['words']]
    exec(request['before'], {})
    return sys.modules[module].main


if __name__ == '__main__':
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    warm()
    connection = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    connection.sendall(b'1')
    if asked := serve(connection): become(*asked)()
