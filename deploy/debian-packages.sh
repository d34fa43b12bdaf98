#!/bin/sh
# Installs what a Debian machine lacks for the tests. deploy/debian-packages.sh --help
set -eu

help() {
  cat <<'EOF'
usage: deploy/debian-packages.sh [--list | --dry-run] [LANE ...]

Installs the Debian packages that ./check needs and this machine lacks: for all lanes, or for those named. What is there stays as
it is, wherever it comes from; services of the packages are not started. Needs root, or sudo.

  --list     print each lane with its packages, and install nothing
  --dry-run  print the packages that are missing, and install nothing

exit codes: 0 all is there, 1 apt-get failed, 2 bad usage, not Debian, or neither root nor sudo
EOF
}

say() { printf '%s\n' "$*" >&2; }

# Package, what shows that it is there (a command, or a file or folder), and the lanes that need it; `all`: Caesura itself.
packages() {
  cat <<'EOF'
ca-certificates    /etc/ssl/certs/ca-certificates.crt     all
python3            python3                                all
python3-pip        +pip                                   all
git                git                                    unit integration e2e journeys clusters
openssl            openssl                                unit integration e2e journeys clusters
tar                tar                                    unit integration e2e journeys clusters
mosquitto          mosquitto                              unit integration e2e journeys clients kexec kexec-all clusters nats
mosquitto-clients  mosquitto_sub                          integration e2e journeys clusters
postgresql         /usr/lib/postgresql/                    integration clusters
nats-server        nats-server                            nats
rabbitmq-server    /usr/lib/rabbitmq/bin/rabbitmq-server  integration clusters
prometheus         promtool                               unit integration e2e journeys
curl               curl                                   integration e2e compose journeys clients clusters
qemu-system-x86    qemu-system-x86_64                     unit integration e2e journeys kexec kexec-all
qemu-utils         qemu-img                               unit integration e2e journeys kexec kexec-all
ovmf               /usr/share/OVMF/OVMF_CODE.fd           integration e2e journeys
swtpm              swtpm                                  integration e2e journeys
libvirt-daemon     libvirtd                               integration e2e journeys
libvirt-daemon-driver-qemu /usr/lib/x86_64-linux-gnu/libvirt/connection-driver/libvirt_driver_qemu.so integration e2e journeys
libvirt-clients    virsh                                  integration e2e journeys
python3-libvirt    /usr/lib/python3/dist-packages/libvirt.py integration e2e journeys
slirp4netns        slirp4netns                            e2e journeys
iproute2           ip                                     integration e2e compose journeys clients
e2fsprogs          mkfs.ext4                              unit integration e2e journeys kexec kexec-all
util-linux         fsfreeze                               integration e2e journeys clients
chromium           chromium                               e2e journeys
fonts-dejavu-core  /usr/share/fonts/truetype/dejavu       e2e journeys
nodejs             node                                   asyncapi clients
npm                npm                                    asyncapi clients
resource-agents    /usr/lib/ocf/resource.d/heartbeat      clients
docker.io          dockerd                                compose
docker.io          docker                                 compose
iptables           iptables                               compose
debootstrap        debootstrap                            compose kexec kexec-all
gcc                gcc                                    kexec kexec-all
EOF
}

lanes() { packages | awk '{for (i = 3; i <= NF; i++) if (!seen[$i]++) print $i}'; }

there() { # what shows that a package is there
  case "$1" in
    +pip) python3 -m pip --version >/dev/null 2>&1 ;;
    /*) [ -e "$1" ] ;;
    *) command -v "$1" >/dev/null 2>&1 || [ -x "/usr/sbin/$1" ] ;;
  esac
}

mode=install
wanted=
for word in "$@"; do
  case "$word" in
    -h | --help) help; exit 0 ;;
    --list | --dry-run) mode=${word#--} ;;
    -*) say "debian-packages: no option $word; see --help"; exit 2 ;;
    *)
      lanes | grep -qx -- "$word" || { say "debian-packages: no lane $word; there are: $(lanes | tr '\n' ' ')"; exit 2; }
      wanted="$wanted $word"
      ;;
  esac
done

if [ "$mode" = list ]; then
  lanes | while read -r lane; do
    printf '%s: %s\n' "$lane" "$(packages | awk -v lane="$lane" '{for (i = 3; i <= NF; i++) if ($i == lane && !seen[$1]++) printf "%s%s", n++ ? " " : "", $1}')"
  done
  exit 0
fi

missing=$(
  packages | while read -r package shown for_lanes; do
    needed=
    for lane in $for_lanes; do
      case " ${wanted:-$lane} all " in *" $lane "*) needed=1 ;; esac
    done
    if [ -n "$needed" ] && ! there "$shown"; then echo "$package"; fi
  done | sort -u
)

if [ -z "$missing" ]; then
  say "debian-packages: nothing is missing"
  exit 0
fi
if [ "$mode" = dry-run ]; then
  printf '%s\n' "$missing"
  exit 0
fi

command -v apt-get >/dev/null 2>&1 || {
  say "debian-packages: apt-get is not installed: this is not Debian. Install these by other means:" $missing; exit 2; }
sudo=
if [ "$(id -u)" != 0 ]; then
  command -v sudo >/dev/null 2>&1 || {
    say "debian-packages: neither root nor sudo; as root: apt-get install --no-install-recommends" $missing; exit 2; }
  sudo=sudo
fi

# Packages start their services at once; the tests start their own, on ports of their own.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
  printf '#!/bin/sh\nexit 101\n' | $sudo tee "$policy" >/dev/null
  $sudo chmod 755 "$policy"
  trap '$sudo rm -f "$policy"' EXIT
fi
say "debian-packages: installing" $missing
$sudo env DEBIAN_FRONTEND=noninteractive apt-get update -qq || { say "debian-packages: apt-get update failed, see above"; exit 1; }
# shellcheck disable=SC2086 # one word a package
$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing || {
  say "debian-packages: apt-get install failed, see above; what was installed stays, and the next run installs the rest"; exit 1; }
say "debian-packages: done"
