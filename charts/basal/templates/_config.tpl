{{/* Keys of cilium-config that agents read, operators too. */}}
{{- define "basal.config.shared" -}}
cluster-name: {{ .Values.cluster.name | quote }}
cluster-id: {{ .Values.cluster.id | quote }}
ipam: {{ .Values.ipam.mode | quote }}
enable-ipv4: {{ .Values.ipv4.enabled | quote }}
enable-ipv6: {{ .Values.ipv6.enabled | quote }}
{{- if .Values.etcd.enabled }}
identity-allocation-mode: "kvstore"
kvstore: "etcd"
kvstore-opt: '{"etcd.config": "/var/lib/etcd-config/etcd.config"}'
etcd-config: |
  endpoints:
  {{- range .Values.etcd.endpoints }}
    - {{ . | quote }}
  {{- end }}
  {{- if .Values.etcd.ssl }}
  trusted-ca-file: /var/lib/etcd-secrets/etcd-client-ca.crt
  cert-file: /var/lib/etcd-secrets/etcd-client.crt
  key-file: /var/lib/etcd-secrets/etcd-client.key
  {{- end }}
{{- else }}
identity-allocation-mode: "crd"
{{- end }}
debug: {{ .Values.debug.enabled | quote }}
{{- end }}

{{/* Keys that only agents read. */}}
{{- define "basal.config.agent" -}}
routing-mode: {{ .Values.routingMode | quote }}
auto-direct-node-routes: {{ .Values.autoDirectNodeRoutes | quote }}
direct-routing-skip-unreachable: {{ .Values.directRoutingSkipUnreachable | quote }}
{{- with .Values.ipv4NativeRoutingCIDR }}
ipv4-native-routing-cidr: {{ . | quote }}
{{- end }}
{{- with .Values.ipv6NativeRoutingCIDR }}
ipv6-native-routing-cidr: {{ . | quote }}
{{- end }}
tunnel-protocol: {{ .Values.tunnelProtocol | quote }}
tunnel-port: {{ .Values.tunnelPort | default 8472 | quote }}
{{- with .Values.MTU }}
mtu: {{ . | quote }}
{{- end }}
enable-ipv4-masquerade: {{ .Values.enableIPv4Masquerade | quote }}
enable-ipv6-masquerade: {{ .Values.enableIPv6Masquerade | quote }}
enable-host-legacy-routing: {{ .Values.bpf.hostLegacyRouting | quote }}
enable-tcx: {{ .Values.bpf.enableTCX | quote }}
enable-bpf-masquerade: {{ .Values.bpf.masquerade | quote }}
{{- with .Values.bpf.ctTcpMax }}
bpf-ct-global-tcp-max: {{ . | int | quote }}
{{- end }}
{{- with .Values.bpf.ctAnyMax }}
bpf-ct-global-any-max: {{ . | int | quote }}
{{- end }}
{{- with .Values.bpf.natMax }}
bpf-nat-global-max: {{ . | int | quote }}
{{- end }}
{{- with .Values.devices }}
devices: {{ . | quote }}
{{- end }}
conntrack-gc-interval: {{ .Values.conntrackGCInterval | quote }}
kube-proxy-replacement: {{ .Values.kubeProxyReplacement | quote }}
enable-policy: {{ .Values.policyEnforcementMode | lower | quote }}
{{- with .Values.labels }}
labels: {{ . | quote }}
{{- end }}
cni-exclusive: {{ .Values.cni.exclusive | quote }}
procfs: "/host/proc"
agent-health-port: {{ .Values.healthPort | quote }}
{{- if .Values.prometheus.enabled }}
prometheus-serve-addr: ":{{ .Values.prometheus.port }}"
{{- end }}
{{- end }}

{{/* Keys that only operators read. */}}
{{- define "basal.config.operator" -}}
{{- with .Values.ipam.operator }}
{{- if $.Values.ipv4.enabled }}
cluster-pool-ipv4-cidr: {{ .clusterPoolIPv4PodCIDRList | join " " | quote }}
cluster-pool-ipv4-mask-size: {{ .clusterPoolIPv4MaskSize | quote }}
{{- end }}
{{- if $.Values.ipv6.enabled }}
cluster-pool-ipv6-cidr: {{ .clusterPoolIPv6PodCIDRList | join " " | quote }}
cluster-pool-ipv6-mask-size: {{ .clusterPoolIPv6MaskSize | quote }}
{{- end }}
cluster-pool-quarantine: {{ .clusterPoolQuarantine | quote }}
{{- end }}
identity-gc-interval: {{ .Values.operator.identityGCInterval | quote }}
cilium-endpoint-gc-interval: {{ .Values.operator.endpointGCInterval | quote }}
nodes-gc-interval: {{ .Values.operator.nodeGCInterval | quote }}
skip-crd-creation: {{ .Values.operator.skipCRDCreation | quote }}
enable-metrics: {{ .Values.operator.prometheus.enabled | quote }}
{{- if .Values.operator.prometheus.enabled }}
operator-prometheus-serve-addr: ":{{ .Values.operator.prometheus.port }}"
{{- end }}
{{- with .Values.operator.leaderElection }}
leader-election-lease-duration: {{ .leaseDuration | quote }}
leader-election-renew-deadline: {{ .renewDeadline | quote }}
leader-election-retry-period: {{ .retryPeriod | quote }}
{{- end }}
{{- end }}
