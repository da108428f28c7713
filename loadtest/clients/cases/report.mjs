// What the scripts for Node.js share; settings as in report.py.
export const URL = process.env.KVLOOM_URL;
export const MODEL = process.env.KVLOOM_MODEL;
export const TOOL_CHOICE = process.env.KVLOOM_TOOL_CHOICE ?? "required";
export const QUESTION = "What is the weather in Bonn? Use the tool get_weather.";
export const MAX_TOKENS = 128;

export function require(ok, what) {
  if (!ok) throw new Error(what);
}

export async function run(cases) {
  console.log(JSON.stringify({ cases: Object.keys(cases) }));
  for (const [name, attempt] of Object.entries(cases)) {
    let problem = "";
    try {
      await attempt();
    } catch (error) {
      problem = String(error?.message ?? error) || "failed";
    }
    console.log(JSON.stringify({ case: name, problem }));
  }
}
