// As harness.py.
export const ADDRESS = process.argv[2];
export const KEY = "sk-of-nobody";
export const CAPITAL = "capital of Peru?", WEATHER = "weather in Lima and Quito?", PEOPLE = "how many people?", SLOW = "tell it slowly";

export function check(found, wanted) {
  if (JSON.stringify(found) !== JSON.stringify(wanted)) throw new Error(`${JSON.stringify(found)} is not ${JSON.stringify(wanted)}`);
}

export async function run(features) {
  const told = {};
  for (const [name, feature] of Object.entries(features)) {
    try {
      await feature();
      told[name] = "ok";
    } catch (error) {
      console.error(error);
      told[name] = `${error.name}: ${error.message}`.slice(0, 500);
    }
  }
  console.log("\n" + JSON.stringify(told));
  process.exit(0);
}
