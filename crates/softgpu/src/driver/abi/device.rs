//! Initialisation, errors and devices.

use std::ffi::c_char;

use crate::driver::codes::{INVALID_DEVICE, INVALID_VALUE, NO_DEVICE, named};
use crate::driver::state::{Device, Driver, Res};
use crate::driver::{Out, cuda};

fn ordinal(d: &Driver, dev: i32) -> Res<usize> {
    d.ready()?;
    if dev >= 0 && (dev as usize) < d.devices.len() {
        Ok(dev as usize)
    } else {
        Err(INVALID_DEVICE)
    }
}

/// What the virtual device says about itself, by `CUdevice_attribute`.
fn attribute(d: &Driver, dev: i32, which: i32) -> Option<i32> {
    Some(match which {
        1..=3 => 1024,
        4 => 64,
        5 => i32::MAX,
        6 | 7 => 65535,
        8 => 48 << 10,
        9 => 64 << 10,
        10 => 32,
        12 | 82 => 65536,
        13 => 1_410_000,
        14 => 512,
        15 | 19 | 31 | 41 | 78 | 90 | 115 => 1,
        16 => 108,
        17 | 18 | 20 | 32 | 34 | 35 | 50 | 84 | 88 | 91 | 95 | 100 | 101 => 0,
        33 => dev + 1,
        36 => 1_215_000,
        37 => 5120,
        38 => 40 << 20,
        39 => 2048,
        40 => 3,
        75 => d.config.sm as i32 / 10,
        76 => d.config.sm as i32 % 10,
        81 => 164 << 10,
        83 => d.config.managed.into(),
        89 => (d.config.managed && d.config.concurrent).into(),
        97 => 163 << 10,
        106 => 32,
        111 => 1 << 10,
        _ => return None,
    })
}

cuda! {
    /// `cuInit`.
    fn cuInit(flags: u32) [None, 0] |d| {
        if flags != 0 {
            return Err(INVALID_VALUE);
        }
        if d.config.devices == 0 {
            return Err(NO_DEVICE);
        }
        if !d.initialised {
            d.initialised = true;
            d.devices = (0..d.config.devices).map(|_| Device::default()).collect();
        }
        Ok(())
    }

    /// `cuDriverGetVersion`.
    fn cuDriverGetVersion(version: Out<i32>) [None, 0] |d| { version.set(d.config.version) }

    /// `cuDeviceGet`.
    fn cuDeviceGet(device: Out<i32>, dev: i32) [None, 0] |d| {
        ordinal(d, dev)?;
        device.set(dev)
    }

    /// `cuDeviceGetCount`.
    fn cuDeviceGetCount(count: Out<i32>) [None, 0] |d| {
        d.ready()?;
        count.set(d.devices.len() as i32)
    }

    /// `cuDeviceGetName`.
    fn cuDeviceGetName(name: Out<u8>, len: i32, dev: i32) [None, 0] |d| {
        let i = ordinal(d, dev)?;
        let text = format!("softgpu device {i} (sm_{})", d.config.sm);
        let len = usize::try_from(len).map_err(|_| INVALID_VALUE)?;
        if len == 0 {
            return Err(INVALID_VALUE);
        }
        for (k, b) in text.bytes().take(len - 1).chain([0]).enumerate() {
            name.set_at(k, b)?;
        }
        Ok(())
    }

    /// `cuDeviceGetUuid_v2`.
    fn cuDeviceGetUuid_v2(uuid: Out<[u8; 16]>, dev: i32) [None, 0] |d| {
        let i = ordinal(d, dev)?;
        let mut id = *b"softgpu virtual\0";
        id[15] = i as u8;
        uuid.set(id)
    }

    /// `cuDeviceGetUuid`.
    fn cuDeviceGetUuid(uuid: Out<[u8; 16]>, dev: i32) [None, 0] |d| {
        let i = ordinal(d, dev)?;
        let mut id = *b"softgpu virtual\0";
        id[15] = i as u8;
        uuid.set(id)
    }

    /// `cuDeviceGetAttribute`.
    fn cuDeviceGetAttribute(value: Out<i32>, which: i32, dev: i32) [None, 0] |d| {
        ordinal(d, dev)?;
        match attribute(d, dev, which) {
            Some(v) => value.set(v),
            None => d.unsupported(&format!("device attribute {which}")),
        }
    }

    /// `cuDeviceTotalMem_v2`.
    fn cuDeviceTotalMem_v2(bytes: Out<usize>, dev: i32) [None, 0] |d| {
        ordinal(d, dev)?;
        bytes.set(d.config.total as usize)
    }

    /// `cuDeviceCanAccessPeer`: never; devices share nothing but managed and host memory.
    fn cuDeviceCanAccessPeer(can: Out<i32>, dev: i32, peer: i32) [None, 0] |d| {
        ordinal(d, dev)?;
        ordinal(d, peer)?;
        can.set(0)
    }

    /// `cuGetErrorName`.
    fn cuGetErrorName(error: i32, text: Out<*const c_char>) [None, 0] |_d| {
        let n = named(error).ok_or(INVALID_VALUE)?;
        text.set(n.1.as_ptr().cast())
    }

    /// `cuGetErrorString`.
    fn cuGetErrorString(error: i32, text: Out<*const c_char>) [None, 0] |_d| {
        let n = named(error).ok_or(INVALID_VALUE)?;
        text.set(n.2.as_ptr().cast())
    }
}
