# shellcheck shell=bash
# What the shell or command of interactive_1node_2gpus.sh finds on the node. Runs there, after
# ~/.bashrc: what was set on the login node is lost where ~/.bashrc puts another Python first in PATH.
#
#   bash --rcfile on_node.bash          a shell: yours, then HPCML_MODULES, then .venv
#   bash on_node.bash COMMAND ARG...    the same for one command
#
# No `set -euo pipefail`: the shell it is read into is yours.

if [[ $- == *i* && -f ~/.bashrc ]]; then
  # shellcheck source=/dev/null
  source ~/.bashrc
fi

_hpcml_on_node() {
  local init venv modules failed=0
  HPCML_PROJECT=${HPCML_PROJECT:-$(dirname "$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")")}
  export HPCML_PROJECT
  read -ra modules <<<"${HPCML_MODULES-}"
  if ((${#modules[@]})); then
    # A shell that is no login shell may not know `module` yet: Lmod, then Environment Modules.
    for init in "${LMOD_PKG-}/init/bash" "${MODULESHOME-}/init/bash" /etc/profile.d/{lmod,z00_lmod,modules}.sh; do
      if type module >/dev/null 2>&1; then break; fi
      # shellcheck source=/dev/null
      if [[ -f $init ]]; then source "$init"; fi
    done
    if ! module load "${modules[@]}"; then
      printf 'HPCML_MODULES: could not load %s: "module avail" lists what this node has\n' "${modules[*]}" >&2
      failed=1
    fi
  fi
  venv=${VIRTUAL_ENV:-$HPCML_PROJECT/.venv}
  if [[ ${HPCML_ACTIVATE-} != 0 && -f $venv/bin/activate && $PATH != "$venv/bin:"* ]]; then
    # shellcheck source=/dev/null
    source "$venv/bin/activate"
  fi
  return $failed
}

if _hpcml_on_node || [[ $- == *i* ]]; then
  unset -f _hpcml_on_node
  if (($#)); then exec "$@"; fi
else
  exit 1
fi
