{{/* The image of a container: of .image, else of .default, else of the chart. */}}
{{- define "basal.image" -}}
{{- $own := .image | default dict -}}
{{- $repository := $own.repository | default .default.repository -}}
{{- $digest := $own.digest | default (ternary "" .default.digest (not (empty $own.tag))) -}}
{{- if $digest -}}
{{ $repository }}@{{ $digest }}
{{- else -}}
{{ $repository }}:{{ $own.tag | default .default.tag | default .chart.AppVersion }}
{{- end -}}
{{- end }}

{{/* Labels of every object. */}}
{{- define "basal.labels" -}}
app.kubernetes.io/part-of: cilium
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{/* Labels by which Cilium's tools, and selectors here, find agents. */}}
{{- define "basal.agent.selector" -}}
k8s-app: cilium
app.kubernetes.io/name: basal-agent
{{- end }}

{{/* Labels by which Cilium's tools, and selectors here, find operators. */}}
{{- define "basal.operator.selector" -}}
io.cilium/app: operator
app.kubernetes.io/name: basal-operator
{{- end }}

{{/* Environment of both daemons. */}}
{{- define "basal.env" -}}
- name: K8S_NODE_NAME
  valueFrom:
    fieldRef:
      fieldPath: spec.nodeName
- name: CILIUM_K8S_NAMESPACE
  valueFrom:
    fieldRef:
      fieldPath: metadata.namespace
- name: POD_NAME
  valueFrom:
    fieldRef:
      fieldPath: metadata.name
{{- with .Values.k8sServiceHost }}
- name: KUBERNETES_SERVICE_HOST
  value: {{ . | quote }}
{{- end }}
{{- with .Values.k8sServicePort }}
- name: KUBERNETES_SERVICE_PORT
  value: {{ . | quote }}
{{- end }}
{{- end }}

{{/* Mounts of the configuration and of etcd's certificates, in both daemons. */}}
{{- define "basal.config.mounts" -}}
- name: cilium-config
  mountPath: /tmp/cilium/config-map
  readOnly: true
{{- if .Values.etcd.enabled }}
- name: etcd-config
  mountPath: /var/lib/etcd-config
  readOnly: true
{{- if .Values.etcd.ssl }}
- name: etcd-secrets
  mountPath: /var/lib/etcd-secrets
  readOnly: true
{{- end }}
{{- end }}
{{- end }}

{{/* Volumes for them; .secret names the secret, .mode its files' permissions, in decimal: 0400 is not the same number in
every YAML. 256 is r--------, 288 is r--r-----. */}}
{{- define "basal.config.volumes" -}}
- name: cilium-config
  configMap:
    name: cilium-config
{{- if .root.Values.etcd.enabled }}
- name: etcd-config
  configMap:
    name: cilium-config
    items:
      - key: etcd-config
        path: etcd.config
{{- if .root.Values.etcd.ssl }}
- name: etcd-secrets
  secret:
    secretName: {{ .secret }}
    defaultMode: {{ .mode }}
{{- end }}
{{- end }}
{{- end }}
