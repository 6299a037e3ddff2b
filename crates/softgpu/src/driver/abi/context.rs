//! Primary contexts and the calling thread's current one.

use crate::driver::codes::{
    INVALID_CONTEXT, INVALID_DEVICE, INVALID_VALUE, PRIMARY_CONTEXT_ACTIVE,
};
use crate::driver::state::{CONTEXT, Driver, Res};
use crate::driver::{Out, cuda};

fn ordinal(d: &Driver, dev: i32) -> Res<u32> {
    d.ready()?;
    if dev >= 0 && (dev as usize) < d.devices.len() { Ok(dev as u32) } else { Err(INVALID_DEVICE) }
}

fn handle(ctx: Option<u32>) -> u64 {
    ctx.map_or(0, |i| CONTEXT + u64::from(i))
}

cuda! {
    /// `cuDevicePrimaryCtxRetain`.
    fn cuDevicePrimaryCtxRetain(ctx: Out<u64>, dev: i32) [None, 0] |d| {
        let i = ordinal(d, dev)?;
        ctx.wanted()?;
        d.devices[i as usize].retained += 1;
        ctx.set(handle(Some(i)))
    }

    /// `cuDevicePrimaryCtxRelease_v2`: the last release ends the context and all in it.
    fn cuDevicePrimaryCtxRelease_v2(dev: i32) [None, 0] |d| {
        let i = ordinal(d, dev)?;
        match d.devices[i as usize].retained {
            0 => Err(INVALID_CONTEXT),
            n => {
                d.devices[i as usize].retained = n - 1;
                if n == 1 {
                    d.destroy(i);
                }
                Ok(())
            }
        }
    }

    /// `cuDevicePrimaryCtxReset_v2`.
    fn cuDevicePrimaryCtxReset_v2(dev: i32) [None, 0] |d| {
        let i = ordinal(d, dev)?;
        d.destroy(i);
        Ok(())
    }

    /// `cuDevicePrimaryCtxGetState`.
    fn cuDevicePrimaryCtxGetState(dev: i32, flags: Out<u32>, active: Out<i32>) [None, 0] |d| {
        let i = ordinal(d, dev)?;
        flags.maybe(d.devices[i as usize].flags);
        active.set(i32::from(d.devices[i as usize].retained > 0))
    }

    /// `cuDevicePrimaryCtxSetFlags_v2`.
    fn cuDevicePrimaryCtxSetFlags_v2(dev: i32, flags: u32) [None, 0] |d| {
        let i = ordinal(d, dev)? as usize;
        if flags & !0x1f != 0 {
            return Err(INVALID_VALUE);
        }
        if d.devices[i].retained > 0 && d.devices[i].flags != flags {
            return Err(PRIMARY_CONTEXT_ACTIVE);
        }
        d.devices[i].flags = flags;
        Ok(())
    }

    /// `cuCtxSetCurrent`.
    fn cuCtxSetCurrent(ctx: u64) [None, 0] |d| {
        d.ready()?;
        let to = if ctx == 0 { None } else { Some(d.context(ctx)?) };
        d.set_current(to);
        Ok(())
    }

    /// `cuCtxGetCurrent`.
    fn cuCtxGetCurrent(ctx: Out<u64>) [None, 0] |d| {
        d.ready()?;
        ctx.set(handle(d.current()))
    }

    /// `cuCtxPushCurrent_v2`.
    fn cuCtxPushCurrent_v2(ctx: u64) [None, 0] |d| {
        d.ready()?;
        let i = d.context(ctx)?;
        d.push_current(i);
        Ok(())
    }

    /// `cuCtxPopCurrent_v2`.
    fn cuCtxPopCurrent_v2(ctx: Out<u64>) [None, 0] |d| {
        d.ready()?;
        let was = d.pop_current();
        ctx.maybe(handle(was));
        if was.is_some() { Ok(()) } else { Err(INVALID_CONTEXT) }
    }

    /// `cuCtxGetDevice`.
    fn cuCtxGetDevice(dev: Out<i32>) [None, 0] |d| {
        d.ready()?;
        dev.set(d.current().ok_or(INVALID_CONTEXT)? as i32)
    }

    /// `cuCtxGetFlags`.
    fn cuCtxGetFlags(flags: Out<u32>) [None, 0] |d| {
        let i = d.device()?;
        flags.set(d.devices[i as usize].flags)
    }

    /// `cuCtxSetFlags`.
    fn cuCtxSetFlags(flags: u32) [None, 0] |d| {
        let i = d.device()?;
        if flags & !0x1f != 0 {
            return Err(INVALID_VALUE);
        }
        d.devices[i as usize].flags = flags;
        Ok(())
    }

    /// `cuCtxGetStreamPriorityRange`.
    fn cuCtxGetStreamPriorityRange(least: Out<i32>, greatest: Out<i32>) [None, 0] |d| {
        d.device()?;
        least.maybe(0);
        greatest.maybe(-5);
        Ok(())
    }

    /// `cuCtxSynchronize`.
    fn cuCtxSynchronize() [None, 0] |d| {
        let i = d.device()?;
        d.wait_device(i)
    }
}
