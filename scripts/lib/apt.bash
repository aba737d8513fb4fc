# shellcheck shell=bash
# apt_install: what setup and test use where they may install Debian packages.

# may_apt: is this root on Debian or one of its children?
may_apt() { ((EUID == 0)) && [[ -e /etc/debian_version ]] && command -v apt-get >/dev/null; }

# apt_install PACKAGE...: without questions or chatter, and without starting the services that come along.
apt_install() (
  umask 022 # what apt writes is read by other users
  policy=/usr/sbin/policy-rc.d
  if [[ ! -e $policy ]]; then
    # The documented way to keep a package from starting its daemon: exit status 101 is "not allowed".
    trap 'rm -f "$policy"' EXIT
    trap 'exit 130' INT TERM HUP
    printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod 755 "$policy" || exit 1
  fi
  export DEBIAN_FRONTEND=noninteractive
  quiet=(-qq -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0)
  # An update may fail for one source of many; then the lists that are there may do.
  apt-get "${quiet[@]}" update </dev/null >/dev/null || true
  apt-get "${quiet[@]}" install --yes --no-install-recommends "$@" </dev/null >/dev/null
)
