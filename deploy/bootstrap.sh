# Sourced by ./demo and ./check from the checkout's root: finds or installs uv, then syncs the environment.
# Needs python3 (3.11 or newer) and pip, nothing else. POSIX sh.

export UV_PYTHON_DOWNLOADS=never UV_NO_PROGRESS=1 PIP_ROOT_USER_ACTION=ignore

# Where Python may keep no bytecode, each of a hundred processes compiles every module that it imports: a third to a half of its start.
unset PYTHONDONTWRITEBYTECODE

say() { printf '%s\n' "$*" >&2; }

trust_the_system() { # uv brings roots of its own: behind a proxy that inspects TLS it would fail where pip works
  SSL_CERT_FILE=${SSL_CERT_FILE:-${PIP_CERT:-${REQUESTS_CA_BUNDLE:-}}}
  [ -n "$SSL_CERT_FILE" ] && export SSL_CERT_FILE || unset SSL_CERT_FILE
  # Where a system keeps its roots: Debian, Fedora, SUSE, Alpine, macOS. A machine without any is served by uv's own.
  for store in "${SSL_CERT_FILE:-}" /etc/ssl/certs/ca-certificates.crt /etc/pki/tls/certs/ca-bundle.crt \
    /etc/ssl/ca-bundle.pem /etc/ssl/cert.pem; do
    # The second name is that of uv before 0.10 (one from the PATH may be older).
    [ -s "$store" ] && export UV_SYSTEM_CERTS="${UV_SYSTEM_CERTS:-true}" UV_NATIVE_TLS="${UV_NATIVE_TLS:-true}" && return
  done
  return 0
}

find_uv() {
  trust_the_system
  if [ -x .uv/bin/uv ]; then
    UV=.uv/bin/uv
  elif command -v uv >/dev/null 2>&1; then
    UV=uv
  else
    command -v python3 >/dev/null 2>&1 || { say "python3 is not installed; Caesura needs Python 3.11 or newer"; exit 2; }
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
      say "$(python3 --version) is too old; Caesura needs Python 3.11 or newer"; exit 2; }
    python3 -m pip --version >/dev/null 2>&1 || { say "pip is not installed for python3 (on Debian: apt-get install python3-pip)"; exit 2; }
    say "installing uv into .uv (once, some 2 s) ..."
    python3 -m pip install --quiet --disable-pip-version-check --target .uv --require-hashes -r deploy/uv.txt || { say "pip could not install uv, see above"; exit 2; }
    UV=.uv/bin/uv
  fi
}

sync_environment() { # arguments: further options of uv sync
  [ -d .venv ] || say "installing Caesura and what it needs into .venv (once, some 5 s) ..."
  "$UV" sync --quiet --locked --inexact --compile-bytecode "$@" || { say "uv could not make the environment, see above"; exit 2; }
}
