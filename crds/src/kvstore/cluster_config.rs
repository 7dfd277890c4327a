//! What a cluster tells the others of a mesh: `cilium/cluster-config/<cluster>`.

use serde_json::{Map, Value, json};

use super::fields::{Fields, RecordError, parse_json};
use crate::names::ClusterId;

/// A cluster's configuration.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct ClusterConfig {
    /// The cluster's id.
    pub id: ClusterId,
    /// What it can do.
    pub capabilities: Capabilities,
}

/// What a cluster can do.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Capabilities {
    /// It marks complete records (`cilium/synced/…`).
    pub synced_canaries: bool,
    /// Its records stand below `cilium/cache/` (written by a mesh's cache only).
    pub cached: bool,
    /// How many clusters a mesh may have, 255 or 511; 0 in a record of a release that did not tell.
    pub max_connected_clusters: u32,
    /// Whether it exports services by the Multi-Cluster Services API; `None` in a record of a release that knows none.
    pub service_exports_enabled: Option<bool>,
    /// How it exports services.
    pub endpoint_slices_export_mode: EndpointSlicesExportMode,
}

/// How a cluster exports the backends of its services.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub enum EndpointSlicesExportMode {
    /// As services only; not written.
    #[default]
    Services,
    /// As services and as EndpointSlices.
    ServicesAndEndpointSlices,
    /// As EndpointSlices only.
    EndpointSlices,
}

impl EndpointSlicesExportMode {
    /// The text; empty for the default.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Services => "",
            Self::ServicesAndEndpointSlices => "services-and-endpointslices",
            Self::EndpointSlices => "endpointslices-only",
        }
    }
}

impl ClusterConfig {
    /// The record's text: every field is left out that has Go's zero value.
    #[must_use]
    pub fn to_json(&self) -> String {
        let Capabilities {
            synced_canaries,
            cached,
            max_connected_clusters,
            service_exports_enabled,
            endpoint_slices_export_mode,
        } = &self.capabilities;
        let mode = endpoint_slices_export_mode.as_str();
        let capabilities = [
            ("syncedCanaries", synced_canaries.then_some(json!(true))),
            ("cached", cached.then_some(json!(true))),
            ("maxConnectedClusters", (*max_connected_clusters != 0).then_some(json!(max_connected_clusters))),
            ("serviceExportsEnabled", service_exports_enabled.map(|enabled| json!(enabled))),
            ("endpointSlicesExportMode", (!mode.is_empty()).then_some(json!(mode))),
        ];
        let capabilities = capabilities.into_iter().filter_map(|(field, value)| Some((field.to_owned(), value?)));
        let mut record = Map::new();
        if self.id.get() != 0 {
            record.insert("id".to_owned(), json!(self.id.get()));
        }
        record.insert("capabilities".to_owned(), Value::Object(capabilities.collect()));
        Value::Object(record).to_string()
    }

    /// Reads a record.
    ///
    /// # Errors
    /// [`RecordError`]; an export mode that is not known is one, since its services could not be read.
    pub fn parse(value: &[u8]) -> Result<Self, RecordError> {
        let value = parse_json("cluster-config record", value)?;
        let fields = Fields::of("cluster-config record", &value)?;
        let id = ClusterId::new(fields.byte("id")?);
        let Some(fields) = fields.object("capabilities")? else {
            return Ok(Self { id, capabilities: Capabilities::default() });
        };
        let mode = fields.string("endpointSlicesExportMode")?;
        let modes = [
            EndpointSlicesExportMode::Services,
            EndpointSlicesExportMode::ServicesAndEndpointSlices,
            EndpointSlicesExportMode::EndpointSlices,
        ];
        let endpoint_slices_export_mode = modes.into_iter().find(|known| known.as_str() == mode).ok_or_else(|| {
            fields
                .error("endpointSlicesExportMode", format!("{mode:?} is not known: this cluster runs a newer release"))
        })?;
        let capabilities = Capabilities {
            synced_canaries: fields.boolean("syncedCanaries")?.unwrap_or_default(),
            cached: fields.boolean("cached")?.unwrap_or_default(),
            max_connected_clusters: fields.number("maxConnectedClusters", u32::MAX)?,
            service_exports_enabled: fields.boolean("serviceExportsEnabled")?,
            endpoint_slices_export_mode,
        };
        Ok(Self { id, capabilities })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The form that Cilium's tests show.
    const SAMPLE: &str =
        r#"{"id":3,"capabilities":{"syncedCanaries":true,"maxConnectedClusters":255,"serviceExportsEnabled":false}}"#;

    #[test]
    fn the_sample_is_read_and_written_byte_for_byte() {
        let config = ClusterConfig::parse(SAMPLE.as_bytes()).unwrap();
        assert_eq!(config.id, ClusterId::new(3));
        assert_eq!(config.capabilities.service_exports_enabled, Some(false));
        assert_eq!(config.to_json(), SAMPLE);
    }

    #[test]
    fn zero_values_are_left_out() {
        assert_eq!(ClusterConfig::default().to_json(), r#"{"capabilities":{}}"#);
        assert_eq!(ClusterConfig::parse(b"{}"), Ok(ClusterConfig::default()));
    }

    #[test]
    fn every_export_mode_is_read_back_and_others_are_refused() {
        for mode in [EndpointSlicesExportMode::ServicesAndEndpointSlices, EndpointSlicesExportMode::EndpointSlices] {
            let capabilities =
                Capabilities { endpoint_slices_export_mode: mode, cached: true, ..Capabilities::default() };
            let config = ClusterConfig { id: ClusterId::new(1), capabilities };
            assert_eq!(ClusterConfig::parse(config.to_json().as_bytes()), Ok(config));
        }
        let error = ClusterConfig::parse(br#"{"capabilities":{"endpointSlicesExportMode":"x"}}"#).unwrap_err();
        assert_eq!(error.field, "capabilities.endpointSlicesExportMode");
        let error = ClusterConfig::parse(br#"{"id":256}"#).unwrap_err().to_string();
        assert_eq!(error, "id: a whole number from 0 to 255 is wanted, not 256");
    }
}
