//! CiliumEndpoints: what `kubectl get ciliumendpoints` shows of this node's pods.

pub mod object;
pub mod task;
