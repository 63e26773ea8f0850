// A client of the original contract in another language: it loads the old .proto file and does the main job.
//
//     node client.js PROTO_FILE COORDINATOR
//
// Ends with status 1 and an error where something is not as the contract says.
"use strict";

const assert = require("node:assert/strict");
const grpc = require("@grpc/grpc-js");
const protoLoader = require("@grpc/proto-loader");

const [protoFile, address] = process.argv.slice(2);
const NRANKS = 4;
const ELEMENTS = 1021; // not a multiple of the ranks

// Numbers, as most JavaScript programs want them: ids must be exact in a double.
const definition = protoLoader.loadSync(protoFile, { keepCase: true, longs: Number, enums: String, defaults: true });
const { gpu_sim: contract } = grpc.loadPackageDefinition(definition);
const stub = new contract.GPUCoordinator(address, grpc.credentials.createInsecure());

function call(method, request) {
  return new Promise((resolve, reject) => {
    stub[method](request, { deadline: Date.now() + 20_000 }, (error, response) =>
      error ? reject(error) : resolve(response),
    );
  });
}

function doubles(values) {
  return Buffer.from(Float64Array.from(values).buffer);
}

async function write(device, values) {
  const response = await call("Memcpy", {
    hostToDevice: { hostSrcData: doubles(values), dstDeviceId: device.deviceId, dstMemAddr: device.minMemAddr },
  });
  assert.equal(response.hostToDevice.success, true);
}

async function read(device) {
  const response = await call("Memcpy", {
    deviceToHost: { srcDeviceId: device.deviceId, srcMemAddr: device.minMemAddr, numBytes: ELEMENTS * 8 },
  });
  const data = response.deviceToHost.dstData;
  assert.equal(data.length, ELEMENTS * 8);
  return Array.from({ length: ELEMENTS }, (_, index) => data.readDoubleLE(index * 8));
}

async function main() {
  const comm = await call("CommInit", { numDevices: NRANKS });
  assert.equal(comm.success, true);
  assert.ok(Number.isSafeInteger(comm.commId), `commId ${comm.commId}`);
  assert.equal(comm.devices.length, NRANKS);
  for (const device of comm.devices) {
    assert.ok(Number.isSafeInteger(device.deviceId.value), `deviceId ${device.deviceId.value}`);
  }
  const commId = comm.commId;
  const status = async () => (await call("GetCommStatus", { commId })).status;
  const addrs = Object.fromEntries(comm.devices.map((device, rank) => [rank, device.minMemAddr]));

  const values = comm.devices.map((_, rank) => Array.from({ length: ELEMENTS }, (_, index) => index * 0.5 + rank));
  const sums = Array.from({ length: ELEMENTS }, (_, index) => values.reduce((sum, own) => sum + own[index], 0));
  for (const [rank, device] of comm.devices.entries()) {
    await write(device, values[rank]);
  }
  assert.equal(await status(), "IN_PROGRESS");

  assert.equal((await call("GroupStart", { commId })).success, true);
  const ring = { commId, count: ELEMENTS * 8, op: "SUM", memAddrs: addrs };
  assert.equal((await call("AllReduceRing", ring)).success, true);
  assert.equal(await status(), "IN_PROGRESS");
  assert.equal((await call("GroupEnd", { commId })).success, true);
  assert.equal(await status(), "SUCCESS");
  for (const device of comm.devices) {
    assert.deepEqual(await read(device), sums);
  }

  const naive = { comm_id: commId, count: ELEMENTS * 8, op: "MAX", mem_addrs: addrs };
  await write(comm.devices[2], sums.map((sum) => sum + 1));
  assert.equal((await call("NaiveAllReduce", naive)).success, true);
  assert.equal(await status(), "SUCCESS");
  for (const device of comm.devices) {
    assert.deepEqual(await read(device), sums.map((sum) => sum + 1));
  }

  await assert.rejects(call("AllReduceRing", { ...ring, count: 7 }), (error) => {
    assert.equal(error.code, grpc.status.INVALID_ARGUMENT);
    assert.match(error.details, /\b7\b.*\b8\b/);
    assert.deepEqual(error.metadata.get("dsml-refusal"), ["COUNT_NOT_MULTIPLE"]);
    return true;
  });
}

main()
  .catch((error) => {
    console.error(error);
    process.exitCode = 1;
  })
  .finally(() => stub.close());
